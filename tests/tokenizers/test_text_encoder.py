import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from smalti.core.errors import UserError
from smalti.core.protocols import TextEncoder
from smalti.tokenizers.text_encoder import CLIPTextEncoder, EmbeddingCache, MiniLMEncoder, T5Encoder

WORDS = ["<pad>", "<s>", "<unk>", "a", "green", "apple", "red", "heart", "</s>"]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder(length=20)


def save_tokenizer(folder, opening):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<s> $A </s>" if opening else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 8)] if opening else [("</s>", 8)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def tiny_t5(folder):
    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder, opening=False)
    return T5Encoder(folder, length=8)


def tiny_clip(folder):
    config = CLIPTextConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=8,
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return CLIPTextEncoder(folder, length=8)


def test_states_do_not_depend_on_the_batch(minilm):
    assert isinstance(minilm, TextEncoder)
    batch = minilm.encode(["a green apple", "red heart", ""])
    alone = minilm.encode(["red heart"])
    assert batch.tokens.shape == (3, 20, minilm.width)
    assert torch.allclose(batch.tokens[1], alone.tokens[0], atol=1e-5)
    assert batch.mask.sum(1).tolist() == [5, 4, 2]
    assert not batch.tokens[~batch.mask].any()
    assert (batch.segments == -1).eq(~batch.mask).all()


def test_scale_is_near_one_and_pooled_has_unit_mean_square(minilm):
    embedding = minilm.encode(["a green apple", "grinning face with smiling eyes", "red heart", "thunder cloud"])
    assert 0.9 < embedding.tokens[embedding.mask].std() < 1.15
    assert torch.allclose(embedding.pooled.pow(2).mean(1), torch.ones(4), atol=1e-5)


def test_pooled_orders_meanings(minilm):
    pooled = minilm.encode(["a green apple", "fruit", "thunder cloud"]).pooled
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2]


def test_segments_are_one_text(minilm):
    parts = minilm.encode([["a green apple", "on a table"]])
    whole = minilm.encode(["a green apple on a table"])
    assert parts.segments[0].tolist() == [0] * 4 + [1] * 4 + [-1] * 12
    assert torch.allclose(parts.tokens, whole.tokens, atol=1e-5)


def test_long_prompt_is_cut_with_one_warning():
    encoder = MiniLMEncoder(length=6)
    with pytest.warns(UserWarning, match="a green apple on a table") as caught:
        cut = encoder.encode(["a green apple on a table"])
    assert len(caught) == 1
    assert "'a table'" in str(caught[0].message)
    assert torch.allclose(cut.tokens, encoder.encode(["a green apple on"]).tokens, atol=1e-5)


@pytest.mark.parametrize("prompts", [[], "a bare string", [3], [["a", 3]]])
def test_bad_prompts(minilm, prompts):
    with pytest.raises(UserError):
        minilm.encode(prompts)


def test_bad_folder_and_length(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        T5Encoder(tmp_path / "absent")
    with pytest.raises(UserError, match="too short"):
        MiniLMEncoder(length=2)


@pytest.mark.parametrize("build", [tiny_t5, tiny_clip])
def test_local_folders(tmp_path, build):
    encoder = build(tmp_path)
    batch = encoder.encode(["a green apple", "red"])
    assert batch.tokens.shape == (2, 8, 16)
    assert batch.pooled.shape == (2, encoder.width)
    assert not batch.tokens[~batch.mask].any()
    assert torch.allclose(batch.tokens[1], encoder.encode(["red"]).tokens[0], atol=1e-5)
    with pytest.warns(UserWarning, match="cut"):
        encoder.encode(["a a a a a a a a red heart"])


def test_clip_pools_the_closing_token(tmp_path):
    batch = tiny_clip(tmp_path).encode(["a green apple", "red"])
    closing = batch.mask.sum(1) - 1
    assert torch.allclose(batch.pooled, batch.tokens[torch.arange(2), closing], atol=1e-5)


def test_fingerprint_follows_weights_and_length(tmp_path):
    first = tiny_t5(tmp_path / "a")
    second = tiny_t5(tmp_path / "b")
    assert first.fingerprint == T5Encoder(tmp_path / "a", length=8).fingerprint
    assert len({first.fingerprint, second.fingerprint, T5Encoder(tmp_path / "a", length=9).fingerprint}) == 3


def test_cache_reads_what_was_written(tmp_path):
    encoder = tiny_t5(tmp_path / "model")
    cache = EmbeddingCache(encoder, tmp_path / "cache")
    made = cache.encode(["a green apple", "red"])
    assert torch.allclose(made.tokens, encoder.encode(["a green apple", "red"]).tokens, atol=2e-3)
    fresh = EmbeddingCache(T5Encoder(tmp_path / "model", length=8), tmp_path / "cache")
    assert "red" in fresh
    assert "heart" not in fresh
    again = fresh.encode(["red", ["a green", "apple"], "red"])
    assert torch.equal(again.tokens[0], made.tokens[1])
    assert torch.equal(again.tokens[2], made.tokens[1])
    assert again.segments[1].tolist() == [0, 0, 1, 1, -1, -1, -1, -1]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_cached_prompts_need_no_model(tmp_path):
    encoder = tiny_t5(tmp_path / "model")
    EmbeddingCache(encoder, tmp_path / "cache").encode(["red"])
    fresh = T5Encoder(tmp_path / "model", length=8)
    EmbeddingCache(fresh, tmp_path / "cache").encode(["red"])
    assert "model" not in fresh.__dict__


def test_torn_cache_is_named(tmp_path):
    encoder = tiny_t5(tmp_path / "model")
    EmbeddingCache(encoder, tmp_path / "cache").encode(["red"])
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="torn"):
        EmbeddingCache(encoder, tmp_path / "cache")
