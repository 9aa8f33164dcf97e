"""One file per family: `build(config)` says what differs from the presets."""
