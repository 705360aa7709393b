"""From request to token: scheduling, the KV cache, sampling, and the ledger of what was spent."""
