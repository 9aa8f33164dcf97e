"""One engine each, loaded and asked over stdin and stdout; run by its own Python, so nothing here imports quire but ours."""
