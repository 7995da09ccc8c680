"""The API that OpenAI's clients speak: models, completions, chat completions and responses."""

from rbee_worker.server.openai.routes import OpenAI

__all__ = ["OpenAI"]
