"""The retrieval judge: does a picture show what its caption says?

Two small heads map frozen EfficientNet-Lite0 features and MiniLM text vectors into one space,
`score = cos(f(features), g(text)) * exp(log_scale)`, and are trained with the symmetric InfoNCE loss of CLIP over
batches in which every concept occurs once. The judge sees training concepts alone and is never used as a teacher; its
score on real held-out pictures is the ceiling for drawn ones.

Source: CLIP (arXiv 2103.00020), section 2.3 and figure 3; InfoNCE (arXiv 1807.03748).
Letters: N pictures, F feature width, T text width, K candidate captions, V captions of a picture.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from smalti.core.errors import UserError


class RetrievalJudge(ModelMixin, ConfigMixin):
    """Scores pictures against captions; saved and read by `save_pretrained` and `from_pretrained`.

    Args:
        feature_width: width of the picture features.
        text_width: width of the text vectors.
        width: width D of the joint space.
        hidden: hidden width of both heads.
        dropout: share of inputs and hidden units that training drops.
    """

    @register_to_config
    def __init__(
        self,
        feature_width: int = 1280,
        text_width: int = 384,
        width: int = 256,
        hidden: int = 512,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.picture_head = _head(feature_width, hidden, width, dropout)
        self.text_head = _head(text_width, hidden, width, dropout)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("feature_mean", torch.zeros(feature_width))
        self.register_buffer("feature_std", torch.ones(feature_width))

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """Scores (N, K) of features (N, F) against text vectors (K, T), or each picture's own (N, K, T)."""
        pictures = self.embed_pictures(features)
        captions = self.embed_text(text)
        scores = pictures @ captions.mT if text.ndim == 2 else torch.einsum("nd,nkd->nk", pictures, captions)
        return scores * self.log_scale.exp()

    def embed_pictures(self, features: Tensor) -> Tensor:
        """Unit vectors (N, D) of features (N, F)."""
        return functional.normalize(self.picture_head((features - self.feature_mean) / self.feature_std), dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """Unit vectors (..., D) of text vectors (..., T)."""
        return functional.normalize(self.text_head(text), dim=-1)

    @torch.no_grad()
    def rank(self, features: Tensor, candidates: Tensor) -> Tensor:
        """Rank (N,) of the first candidate (0 = best) for features (N, F) and texts (N, K, T); ties count against."""
        scores = self(features, candidates)
        return (scores[:, 1:] >= scores[:, :1]).sum(1)

    @torch.no_grad()
    def prefers(self, features: Tensor, matched: Tensor, mismatched: Tensor) -> Tensor:
        """Whether each picture (N, F) fits its matched text (N, T) better than the mismatched one (N, T): bool (N,)."""
        return self.rank(features, torch.stack([matched, mismatched], 1)) == 0


def _head(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, outputs),
    )


@dataclass(frozen=True)
class JudgeTraining:
    """How the judge is trained.

    Args:
        steps: optimisation steps.
        batch: concepts in a batch; fewer if there are fewer.
        lr: peak learning rate, falling to zero along a cosine.
        weight_decay: of AdamW.
        noise: standard deviation of Gaussian noise on the standardised features.
        seed: of the weights, the batches and the noise.
    """

    steps: int = 800
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.3
    noise: float = 0.1
    seed: int = 0


def train_judge(
    features: Tensor, text: Tensor, concepts: Tensor, settings: JudgeTraining | None = None, **config
) -> RetrievalJudge:
    """Trains a judge on pictures of training concepts.

    Args:
        features: picture features (N, F).
        text: text vector of each picture's caption (N, T), or of several captions (N, V, T) of which one is drawn.
        concepts: base concept of each picture (N,) long; pictures of one concept never stand against each other.
        settings: how it is trained.
        config: arguments of `RetrievalJudge` other than the two input widths.

    Returns:
        The judge in evaluation mode.

    Raises:
        UserError: the counts differ, or there are fewer than two concepts.
    """
    settings = settings or JudgeTraining()
    groups = torch.unique(concepts, return_inverse=True)[1]
    count = int(groups.max()) + 1 if len(groups) else 0
    if not len(features) == len(text) == len(groups) or count < 2:
        raise UserError(
            f"got {len(features)} features, {len(text)} texts and {count} concepts; "
            "the judge needs one text and concept for each picture and at least 2 concepts"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        judge = RetrievalJudge(features.shape[1], text.shape[-1], **config)
        judge.feature_mean.copy_(features.mean(0))
        judge.feature_std.copy_(features.std(0).clamp_min(1e-3))
        members = [torch.nonzero(groups == group).flatten() for group in range(count)]
        _optimise(judge.train(), features, text if text.ndim == 3 else text[:, None], members, settings)
    return judge.eval().requires_grad_(False)


def _optimise(
    judge: RetrievalJudge, features: Tensor, text: Tensor, members: list[Tensor], settings: JudgeTraining
) -> None:
    batch = min(settings.batch, len(members))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    right = torch.arange(batch)
    for _ in range(settings.steps):
        chosen = torch.randperm(len(members))[:batch].tolist()
        picks = torch.stack([members[c][torch.randint(len(members[c]), ())] for c in chosen])
        noisy = features[picks]
        noisy = noisy + settings.noise * judge.feature_std * torch.randn_like(noisy)
        scores = judge(noisy, text[picks, torch.randint(text.shape[1], (batch,))])
        loss = (functional.cross_entropy(scores, right) + functional.cross_entropy(scores.mT, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class JudgeReport:
    """What the judge says of pictures and their captions.

    Args:
        first: share of pictures whose caption is ranked first among `candidates`.
        preferred: share of pictures that fit their caption better than one of another picture of their style.
        candidates: captions that compete, the right one included.
        count: pictures judged.
    """

    first: float
    preferred: float
    candidates: int
    count: int


def judge_report(
    judge: RetrievalJudge,
    features: Tensor,
    text: Tensor,
    captions: list[str],
    styles: list[str] | Tensor,
    candidates: int = 20,
    seed: int = 0,
) -> JudgeReport:
    """Retrieval among `candidates` captions, and preference over a caption shuffled within the style.

    Args:
        judge: a trained judge.
        features: picture features (N, F).
        text: text vectors of their captions (N, T).
        captions: their captions; equal ones never compete.
        styles: their styles, as names or indices.
        candidates: captions that compete for a picture.
        seed: of the choice of wrong captions, so that drawn and real pictures meet the same.
    """
    names = styles.tolist() if isinstance(styles, Tensor) else list(styles)
    wrong = distractors(captions, candidates - 1, seed)
    ranks = judge.rank(features, torch.cat([text[:, None], text[wrong]], 1))
    mismatched = distractors(captions, 1, seed + 1, names)[:, 0]
    preferred = judge.prefers(features, text, text[mismatched])
    return JudgeReport(float((ranks == 0).float().mean()), float(preferred.float().mean()), candidates, len(captions))


def distractors(captions: list[str], count: int, seed: int, groups: list | None = None) -> Tensor:
    """Indices (N, count) of pictures with other captions, distinct among themselves, drawn within each group if given.

    Raises:
        UserError: there are not enough different captions.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for own, caption in enumerate(captions):
        row: dict[str, int] = {}
        for index in torch.randperm(len(captions), generator=generator).tolist():
            same_group = groups is None or groups[index] == groups[own]
            if len(row) < count and same_group and captions[index] != caption:
                row.setdefault(captions[index], index)
        if len(row) < count:
            raise UserError(
                f"too few different captions to hold {caption!r} against {count} others; judge more pictures"
            )
        rows.append(list(row.values()))
    return torch.tensor(rows).reshape(len(captions), count)
