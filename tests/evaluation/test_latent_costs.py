from smalti.evaluation.latent_costs import decoder_gflops, denoiser_gflops


def test_a_head_costs_little_and_width_throughout_costs_three_times():
    found = denoiser_gflops()
    assert found["head"] < 1.5 * found["DiT-XL"]
    assert 2.5 * found["DiT-XL"] < found["wide"] < 3.5 * found["DiT-XL"]
    assert 130 < found["head"] / 2 < 190  # the paper counts multiply-adds


def test_a_transformer_decodes_with_fewer_operations_than_convolutions():
    found = decoder_gflops()
    assert found["ViT-XL"] < 0.5 * found["SD-VAE"]
