def test_x(bundle, llama):
    print(sorted(p.name for p in bundle.iterdir()))
    from rk_export.pipeline import verify
    from rk_export.render import parity_text
    print(parity_text(verify(bundle, llama)))
    print(parity_text(verify(bundle)))
