import pytest
import torch

import smalti
from smalti.acceleration.ras import RAS, choose, draw_focus, focus, longest_skip, walk
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.method import Moment
from smalti.core.protocols import Cond
from smalti.core.tokens import TokensCall
from smalti.evaluation.flops import count_flops
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.solvers import Euler, Heun

METHOD = RAS(0.5, start=3, resets=(6,))
N = 10


class Walk:
    """Steps of one branch without a model: what was asked of it at each, and what came out."""

    def __init__(self, method, steps=9, batch=2):
        self.method, self.state, self.asked = method, method.init(), []
        torch.manual_seed(0)
        self.path = torch.randn(steps, batch, N, 1, 4).cumsum(0)
        self.outputs = [self.at(step) for step in range(steps)]

    def at(self, step, evaluation=None):
        def run(active, memory):
            self.asked.append(("all" if active is None else "some", memory is not None, active))
            return torch.full((len(self.path[0]), N, 4), float(step))

        moment = Moment(step, step if evaluation is None else evaluation, 1 - step / 10, len(self.path))
        call = TokensCall(
            moment, self.path[step, :, :, 0], N, run, lambda x: x[:, :, None], lambda x, like: x[:, :, 0],
            lambda event: None,
        )  # fmt: skip
        return self.method.at_tokens(self.state, call)


def test_the_last_dense_step_fills_the_keys_and_so_does_every_reset():
    walk = Walk(METHOD)
    assert [one[:2] for one in walk.asked] == [
        ("all", False), ("all", False), ("all", True), ("some", True), ("some", True), ("some", True), ("all", True),
        ("some", True), ("some", True),
    ]  # fmt: skip


def test_the_set_of_a_step_comes_from_what_the_step_before_did():
    walked = Walk(METHOD)
    increments, skips = walked.path.diff(dim=0), torch.zeros(2, N)
    for step in (3, 4, 5, 7, 8):  # step 7 looks at the increment of the dense step 6
        left = choose(focus(increments[step - 1]), skips, 5, 0.3, 1.0)
        skips.scatter_add_(1, left, torch.ones(2, 5))
        active = walked.asked[step][2]
        assert active.shape == (2, 5)
        assert (active.diff(dim=1) > 0).all()
        for row, out in zip(active.tolist(), left.tolist(), strict=True):
            assert sorted(row + out) == list(range(N))
    assert torch.equal(walked.state.skips, skips)
    assert torch.equal(walk(METHOD, walked.path).sum(0).float(), skips)


def test_left_out_tokens_repeat_their_last_prediction():
    walked = Walk(METHOD)
    expected = torch.full((2, N, 4), 2.0)
    for step in range(3, 9):
        active = walked.asked[step][2]
        if active is None:
            expected = torch.full((2, N, 4), float(step))
        else:
            expected = expected.scatter(1, active[:, :, None].expand(-1, -1, 4), float(step))
        assert torch.equal(walked.outputs[step], expected)


def test_a_branch_that_paused_starts_with_a_dense_step():
    walked = Walk(METHOD, steps=9)
    walked.asked.clear()
    state = walked.method.init()
    walked.state = state
    for step in (3, 4, 7):
        walked.at(step)
    assert [one[:2] for one in walked.asked] == [("all", True), ("some", True), ("all", True)]


@pytest.mark.parametrize(("high", "expected"), [(0.0, [0, 1]), (1.0, [4, 5]), (0.5, [0, 5])])
def test_sides(high, expected):
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    assert sorted(choose(scores, torch.zeros(1, 6), 2, high, 1.0)[0].tolist()) == expected


@pytest.mark.parametrize("high", [0.0, 0.3, 0.7, 1.0])
def test_being_left_out_always_lowers_the_chance_to_be_left_out_again(high):
    """The published sign does the opposite on the high side."""
    torch.manual_seed(0)
    scores, none = torch.rand(1, 40) + 0.5, torch.zeros(1, 40)
    first = choose(scores, none, 20, high, 1.0)
    again = choose(scores, none.scatter(1, first, 5.0), 20, high, 1.0)
    assert not set(first[0].tolist()) & set(again[0].tolist())
    for token in first[0].tolist():
        alone = choose(scores, none.scatter(1, torch.tensor([[token]]), 5.0), 20, high, 1.0)
        assert token not in alone[0].tolist()


def test_a_constant_number_of_times_left_out_changes_nothing():
    scores, skips = torch.rand(2, 30), torch.randint(0, 4, (2, 30)).float()
    for high in (0.0, 0.4, 1.0):
        assert torch.equal(choose(scores, skips - 28, 12, high, 1.0), choose(scores, skips, 12, high, 1.0))


@pytest.mark.parametrize("high", [0.0, 0.3, 1.0])
def test_a_quota_of_nothing_and_of_one(high):
    scores = torch.rand(2, 8)
    assert choose(scores, torch.zeros(2, 8), 0, high, 1.0).shape == (2, 0)
    assert choose(scores, torch.zeros(2, 8), 1, high, 1.0).shape == (2, 1)


def test_starvation_bounds_how_long_a_token_waits():
    torch.manual_seed(0)
    steady = torch.rand(1, 1, 64, 1, 4) * torch.arange(30.0).reshape(-1, 1, 1, 1, 1)  # the same increment in every step
    for skip in ("low", "high", "mix:0.3"):
        settings = {"start": 2, "resets": (), "skip": skip}
        assert longest_skip(walk(RAS(0.5, **settings), steady)) <= 3
        assert longest_skip(walk(RAS(0.5, starvation=0.0, **settings), steady)) == 28


def test_metrics():
    increment = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]])  # two tokens of one place, two channels
    assert focus(increment).tolist() == [[1.0, 0.0]]
    assert focus(increment, "norm")[0].tolist() == pytest.approx([10**0.5, 8**0.5])
    (picture,) = draw_focus(torch.arange(6.0)[None], (2, 3), scale=4)
    assert picture.size == (12, 8)
    assert (picture.getpixel((0, 0)), picture.getpixel((11, 7))) == ((0, 0, 0), (255, 255, 255))


def quotas(method, steps=28, count=1024):
    return [method.quota(Moment(step, step, 0.0, steps), count) for step in range(steps)]


def test_schedules():
    plain = quotas(RAS())
    assert [step for step, quota in enumerate(plain) if not quota] == [0, 1, 2, 3, 12, 20]
    assert set(plain) == {0, 512}
    assert quotas(RAS(end=26))[25:] == [512, 0, 0]
    assert quotas(RAS(start=2, resets=(), ratios=(0.75, 0.5, 0.25)), 7)[2:] == [256, 512, 768, 768, 768]
    ramp = quotas(RAS(ramp=(256, 4), resets=()), 20)[4:]
    assert ramp == [128] * 4 + [384] * 4 + [640] * 4 + [896] * 4
    assert sum(ramp) == 16 * 512
    assert all(one % 64 == 0 for one in quotas(RAS(0.4, ramp=(100, 3)), 28))
    assert quotas(RAS(0.01), count=4)[5] == 3  # somebody runs
    assert not any(quotas(RAS(1.0)))


def test_a_ramp_needs_the_number_of_steps():
    with pytest.raises(Refusal, match="a ramp needs end"):
        RAS(ramp=(64, 4)).quota(Moment(5, 5, 0.5), 1024)


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.0}, {"ratio": 1.5}, {"start": 0}, {"starvation": -1.0}, {"skip": "middle"}, {"skip": "mix:2"},
     {"skip": "mix"}, {"metric": "mean"}, {"selection": "all"}, {"ratios": (0.5, 0.0)}, {"ramp": (64, 0)},
     {"ramp": (64, 4), "ratios": (0.5,)}, {"resets": (-1,)}],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        RAS(**settings)
    assert "\n" not in str(error.value)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def condition(seed, batch):
    generator = torch.Generator().manual_seed(seed)
    return Cond(text=torch.randn(batch, 5, 12, generator=generator), pooled=torch.randn(batch, 10, generator=generator))


def noise(batch, side=16):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def draw(model, method=None, batch=2, solver=None, steps=12, guidance=None, first=0):
    """Final samples, and the handle."""
    cond, uncond = condition(1, 2)[first : first + batch], condition(2, 1)
    uncond = Cond.cat([uncond] * batch)
    schedule = torch.linspace(1, 0, steps + 1).tolist()

    def go():
        return sample(
            model, noise(2)[first : first + batch], schedule, solver or Euler(), cond=cond, uncond=uncond,
            guidance=guidance, progress=False,
        ).x  # fmt: skip

    if method is None:
        return go(), None
    with smalti.apply(model, method) as handle:
        return go(), handle.report()


def test_branches_have_the_same_sets_batched_or_in_turn(model):
    batched, report = draw(model, METHOD, guidance=Guidance(3.0))
    in_turn, other = draw(model, METHOD, guidance=Guidance(3.0, is_batched=False))
    assert torch.allclose(batched, in_turn, atol=1e-4)
    assert report.methods[0].events == {"32 of 64 tokens": 8}
    assert other.methods[0].events == {"32 of 64 tokens": 16}
    assert not torch.allclose(batched, draw(model, guidance=Guidance(3.0))[0], atol=1e-3)


def test_samples_of_a_batch_have_sets_of_their_own(model):
    both, _ = draw(model, METHOD)
    for index in range(2):
        alone, _ = draw(model, METHOD, batch=1, first=index)
        assert torch.allclose(both[index : index + 1], alone, atol=1e-4)


def test_focus_and_its_parts_matter(model):
    results = [draw(model, one)[0] for one in (
        METHOD, RAS(0.5, 3, resets=()), RAS(0.5, 3, None, (6,), starvation=0.0),
        RAS(0.5, 3, None, (6,), kv_cache=False),
        RAS(0.5, 3, None, (6,), selection="random"), RAS(0.5, 3, None, (6,), metric="norm"),
    )]  # fmt: skip
    for index, one in enumerate(results):
        assert all(not torch.allclose(one, other, atol=1e-6) for other in results[index + 1 :])


def test_keys_of_tokens_that_do_not_run_keep_it_closer_to_the_dense_run(model):
    dense, _ = draw(model)
    errors = [(draw(model, RAS(0.5, 3, resets=(6,), kv_cache=on))[0] - dense).norm() for on in (True, False)]
    assert errors[0] < errors[1]


def test_work_and_memory_are_as_counted(model):
    dense = count_flops(lambda: draw(model)).total
    with smalti.apply(model, METHOD) as handle, torch.no_grad():
        for step in range(6):
            model(noise(2) * (1 - step / 10), torch.full((2,), 1 - step / 12), condition(1, 2))
        kept = handle.report().methods[0].kept
    text, image, width, layers = 5, 64, 16, 3
    keys = layers * 2 * 2 * (text + image) * width * 4
    latents = 2 * 2 * 4 * 16 * 16 * 4
    assert kept == keys + latents + 2 * image * 4
    draw(model, METHOD)
    counted = count_flops(lambda: draw(model, METHOD)).total
    assert 0.5 * dense < counted < 0.85 * dense


def test_two_evaluations_a_step_are_warned_of(model):
    with pytest.warns(UserWarning, match="repeats a step"):
        out, _ = draw(model, METHOD, solver=Heun())
    assert torch.isfinite(out).all()


def test_too_few_steps_are_told(model):
    with pytest.raises(NeverEngaged, match="the first 4 are dense"):
        draw(model, RAS(), steps=4)
