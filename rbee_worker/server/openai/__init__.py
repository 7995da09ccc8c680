"""The API for OpenAI's clients: models, completions, chat completions and responses."""

from rbee_worker.server.openai.routes import OpenAI

__all__ = ["OpenAI"]
