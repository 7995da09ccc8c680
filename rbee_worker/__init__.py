"""rbee-worker: an LLM worker that shows what it is doing.

``rbee_worker.runtime.engine.engine.Engine`` loads a model and generates text. Both emit the typed events of
``rbee_worker.events``. The command line iterates ``Engine.load`` and ``Engine.generate`` and shows the events. The
server runs an engine on a thread (``rbee_worker.worker``), with ``add``, ``admit`` and ``step``, and sends the events.
"""

__version__ = "0.2.0"
