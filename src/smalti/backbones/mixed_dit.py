"""A `DiT` with a patch-mixer in front: what its blocks see is what the mixer passes on.

The DiT stays whole, with its own weights and forward. The mixer acts on what enters the first block, all tokens with
their positions; what the last layer gives for the kept ones returns to its places, among zeros. Fixed positions are in
the tokens by then. Rotary ones lie outside of them, one table for all samples, so models of those keep other tokens in
each sample only if their blocks take a table a sample, as MicroDiT's do.

Source: MicroDiT (arXiv 2407.15811), section 3.1: the mixer suits any transformer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.dit import DiT
from smalti.backbones.patch_mixer import PatchMixer
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext
from smalti.ops.token_masks import KEEP
from smalti.ops.token_subset import scatter


class _Call(NamedTuple):
    """What mixer and output need of a running call: the activated vector (B, D), kept places (B, n), N."""

    activated: Tensor
    keep: Tensor | None
    count: int


class MixedDiT(ModelMixin, ConfigMixin):
    """A DiT behind a patch-mixer: `(x, t, cond) -> velocity`; see `with_patch_mixer`.

    Args:
        in_channels, patch_size, num_labels, pooled_dim, text_dim: of the DiT.
        mixer_depth: blocks of the mixer.
        mixer_width: Dm.
        mixer_head_dim: channels of a head in the mixer, which divides Dm.
        denoiser: the DiT's other settings.

    Example:
        >>> import torch
        >>> model = with_patch_mixer(DiT.tiny(), depth=1, width=8, head_dim=4)
        >>> cond = Cond(pooled=torch.zeros(1, 10), extra={"keep": torch.tensor([[0, 3, 5]])})
        >>> model(torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), cond).shape
        torch.Size([1, 4, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        num_labels: int = 0,
        pooled_dim: int = 0,
        text_dim: int = 0,
        mixer_depth: int = 4,
        mixer_width: int = 256,
        mixer_head_dim: int = 64,
        denoiser: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        dit = DiT(
            in_channels, patch_size, num_labels=num_labels, pooled_dim=pooled_dim, text_dim=text_dim, **(denoiser or {})
        )
        self.patch_size = patch_size
        self.mixer = PatchMixer(dit.width, mixer_width, mixer_depth, mixer_head_dim, bool(text_dim))
        self.dit = dit  # behind the mixer, as its blocks run
        self.dit.blocks[0].register_forward_pre_hook(self._mix)
        self.dit.proj_out.register_forward_hook(self._restore)
        self._call: _Call | None = None  # stays after a call: checkpointed blocks run again in the backward pass

    @classmethod
    def tiny(cls) -> "MixedDiT":
        """A model of a few thousand weights, for tests."""
        small = DiT.tiny_text()
        return with_patch_mixer(small, depth=1, width=8, head_dim=4)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicts the velocity, as the DiT; places that stay come in `cond.extra["keep"]` (B, n), None = all stay."""
        keep = cond.extra.get(KEEP)
        if keep is not None and t.ndim != 1:
            raise UserError(f"tokens with times of their own cannot be dropped, got t {tuple(t.shape)}; give t (B,)")
        count = x.shape[-2] * x.shape[-1] // self.patch_size**2
        self._call = _Call(F.silu(self.dit.vector(t, cond)), keep, count)
        return self.dit(x, t, cond)

    def _mix(self, block: nn.Module, given: tuple[Tensor, BlockContext]) -> tuple[Tensor, BlockContext]:
        """Before the first block: all tokens (B, N, D) to the kept ones."""
        tokens, context = given
        assert self._call is not None
        return self.mixer(tokens, context._replace(activated=self._call.activated), self._call.keep), context

    def _restore(self, layer: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        """After the last layer: kept places back among zeros (B, N, C*P*P)."""
        assert self._call is not None
        if self._call.keep is None:
            return output
        whole = output.new_zeros(len(output), self._call.count, output.shape[-1])
        return scatter(output, self._call.keep, whole)


def with_patch_mixer(model: nn.Module, depth: int, width: int, head_dim: int = 64) -> MixedDiT:
    """A model that may be trained on some of its tokens, with the weights of the one given.

    Args:
        model: a `DiT`.
        depth: blocks of the mixer.
        width: Dm, a multiple of head_dim.
        head_dim: channels of a head in the mixer.

    Raises:
        Refusal: the model's positions are not in its tokens.
    """
    if not isinstance(model, DiT):
        raise Refusal(
            f"{type(model).__name__} cannot drop other tokens in each sample: a patch-mixer needs positions that are "
            "added to the tokens, or MicroDiT(positions='rope')"
        )
    own = ("in_channels", "patch_size", "num_labels", "pooled_dim", "text_dim")
    rest = {name: value for name, value in model.config.items() if name not in own and not name.startswith("_")}
    mixed = MixedDiT(
        *(model.config[name] for name in own), mixer_depth=depth, mixer_width=width, mixer_head_dim=head_dim,
        denoiser=rest,
    )  # fmt: skip
    mixed.dit.load_state_dict(model.state_dict())
    return mixed
