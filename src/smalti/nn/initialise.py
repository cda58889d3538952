"""Fresh weights of a transformer, as DiT draws them (arXiv 2212.09748, section 3.2 and its code).

Xavier for linear layers (fused ones as one matrix), normal 0.02 for embedders, zero for biases, for adaLN modulation
and for the output: every block starts as the identity and the prediction at zero.
"""

from collections.abc import Iterable

from torch import nn

from smalti.nn.modulation import FinalNorm, Modulation

EMBEDDER_STD = 0.02


def draw_weights(model: nn.Module, embedders: Iterable[nn.Module | None]) -> None:
    """Draws all weights anew.

    Args:
        model: a transformer whose last layer is its `proj_out`.
        embedders: parts whose weights are normal; None is skipped.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedder in embedders:
        for name, parameter in embedder.named_parameters() if embedder is not None else ():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=EMBEDDER_STD)
    for module in model.modules():
        if isinstance(module, Modulation | FinalNorm):
            nn.init.zeros_(module.linear.weight)
    proj_out = model.get_submodule("proj_out")
    assert isinstance(proj_out, nn.Linear)
    nn.init.zeros_(proj_out.weight)
