"""An OpenAI-compatible server with a depth per request."""
