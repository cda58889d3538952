import shutil

from smalti.tasks import doctor
from smalti.zoo import loader


def by_name():
    return {check["name"]: check for check in doctor.checkup()}


def test_a_sound_installation_and_a_broken_one(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "load_emoji", lambda split: [split] * 3)  # read in its own tests
    monkeypatch.setattr(loader, "ZOO", tmp_path / "zoo")
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache" / "deep"))
    assert not by_name()["models"]["ok"]
    shutil.copytree(tiny_models["text"], tmp_path / "zoo" / "emoji")
    checks = by_name()
    assert all(check["ok"] for check in checks.values() if check["required"])
    assert "M parameters" in checks["model emoji"]["found"]
    assert checks["text encoder"]["found"] == "MiniLM 384 wide"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "zoo" / "emoji" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(doctor, "CORE", ("torch", "no-such-package"))
    checks = by_name()
    assert "torn" in checks["model emoji"]["found"]
    assert checks["no-such-package"]["found"] == "missing; run: pip install no-such-package"
    assert not any(checks[name]["ok"] for name in ("model emoji", "cache folder", "no-such-package"))
    assert all(set(check) == {"name", "ok", "found", "required"} for check in checks.values())
