import functools
import signal
from pathlib import Path

from rbee_worker.cli.failures import interrupts
from rbee_worker.cli.generate import cancelled_by
from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import End
from tests.engines import loaded
from tests.tiny import write_tiny_model


def test_a_signal_before_the_engine_knows_of_the_job_cancels_it(tmp_path: Path) -> None:
    engine = loaded(write_tiny_model(tmp_path))
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    events = engine.generate(GenerationRequest(prompt="a", raw=True, job_id="job", sampling=sampling))
    cancel = functools.partial(engine.cancel, "job")
    with interrupts(cancel) as received:
        signal.raise_signal(signal.SIGINT)
        *_, end = cancelled_by(received, events, cancel)
    assert isinstance(end, End)
    assert end.stop_reason == "cancelled"
    assert end.tokens_out < 5
