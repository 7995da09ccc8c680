"""Events of one load and of one job, as tests of the display, the client and the commands use them."""

from rbee_worker.events import End, Event, LoadingToVram, LoadReport, Ready, Resolving, Started, Token, WarmingUp

MIB = 1024 * 1024
REPORT = LoadReport(
    model="tiny [bold]model",
    architecture="LlamaForCausalLM",
    parameters=1_100_000_000,
    dtype="float16",
    kernel="packed-fp16",
    phases={"resolving": 0.5, "loading_to_vram": 2.25, "warming_up": 1.0},
    bytes_read=300 * MIB,
    bytes_per_second=140_000_000,
    stored_as="gptq 4-bit, groups of 128, dequantized",
    device_mb={"cuda:0": 200, "cuda:1": 100},
    peak_host_mb=1234,
)


def layers(seq: int, loaded: int, *, device: str = "cpu", at: float = 0.0) -> LoadingToVram:
    return LoadingToVram(
        layers_loaded=loaded,
        layers_total=30,
        vram_mb=loaded * 10,
        vram_total_mb=8192,
        device=device,
        bytes_loaded=loaded * 10 * MIB,
        bytes_total=300 * MIB,
        bytes_per_second=140_000_000 if loaded else 0,
        eta_seconds=75.0 if loaded else None,
        seq=seq,
        elapsed_seconds=at,
    )


READY = Ready(seq=33, elapsed_seconds=3.75, report=REPORT)
LOAD: list[Event] = [
    Resolving(model="tiny", seq=0, elapsed_seconds=0.0),
    *(layers(n + 1, n, at=n / 10) for n in range(31)),
    WarmingUp(seq=32, elapsed_seconds=3.0),
    READY,
]
END = End(
    tokens_out=2,
    decode_time_ms=100,
    stop_reason="stop_sequence",
    stop_sequence_matched="\n",
    prompt_tokens=12,
    cached_tokens=4,
    prefill_time_ms=250,
    tokens_per_second=10.0,
)
STARTED = Started(job_id="j", model="m", started_at="2026-11-22T06:00:00.000Z", prompt_tokens=12, seed=7)
JOB: list[Event] = [STARTED, Token(t="Hé\u2028llo\x85", i=0), Token(t=" world 🐝", i=1), END]
TEXT = "Hé\u2028llo\x85 world 🐝\n"
