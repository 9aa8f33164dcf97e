"""What more than one process needs: options, messages, channels, limits. Imports nothing else of ours and never torch."""
