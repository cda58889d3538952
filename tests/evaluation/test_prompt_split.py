from smalti.evaluation.prompt_split import pick, split_prompts


def test_search_and_claim_share_nothing():
    search, claim = split_prompts("emoji", 8, 96)
    assert (len(search), len(claim)) == (8, 96)
    assert not set(search.texts) & set(claim.texts)
    assert not set(search.seeds) & set(claim.seeds)
    assert len(set(search.texts)) == 8
    assert len(set(claim.texts)) > 25
    assert len(set(search.styles)) > 1


def test_pick_keeps_what_belongs_together():
    _, claim = split_prompts("emoji", 8, 16)
    some = pick(claim, [3, 0, 3])
    assert some.texts == (claim.texts[3], claim.texts[0], claim.texts[3])
    assert some.seeds == (claim.seeds[3], claim.seeds[0], claim.seeds[3])
