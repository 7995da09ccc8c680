"""rbee-worker: an LLM worker that shows what it is doing.

``rbee_worker.runtime.engine.engine.Engine`` loads a model and generates text as iterators of the typed events in
``rbee_worker.events``; the command line draws those events and the server sends them.
"""

__version__ = "0.2.0"
