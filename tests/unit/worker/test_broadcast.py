import asyncio

from rbee_worker.events import LoadCancelled, LoadingEvent, LoadingToVram, LoadReport, Ready, Resolving, WarmingUp
from rbee_worker.worker.broadcast import LoadingBroadcast


def counts(seq: int) -> LoadingToVram:
    return LoadingToVram(
        seq=seq,
        elapsed_seconds=0.0,
        layers_loaded=seq,
        layers_total=10_000,
        vram_mb=0,
        vram_total_mb=1,
        device="cpu",
        bytes_loaded=0,
        bytes_total=0,
        bytes_per_second=0,
    )


RESOLVING = Resolving(seq=0, elapsed_seconds=0.0, model="m")


def terminal(seq: int) -> LoadCancelled:
    return LoadCancelled(seq=seq, elapsed_seconds=0.0, vram_mb_freed=0)


def ready(seq: int) -> Ready:
    report = LoadReport(
        model="m",
        architecture="a",
        parameters=1,
        dtype="float32",
        kernel="dense",
        phases={"resolving": 0.1},
        bytes_read=1,
        bytes_per_second=1,
        device_mb={"cpu": 1},
        peak_host_mb=1,
    )
    return Ready(seq=seq, elapsed_seconds=0.0, report=report)


async def collect(broadcast: LoadingBroadcast) -> list[LoadingEvent]:
    return [event async for event in broadcast.subscribe()]


def test_a_subscriber_from_the_start_gets_every_event() -> None:
    async def main() -> list[LoadingEvent]:
        broadcast = LoadingBroadcast()
        task = asyncio.create_task(collect(broadcast))
        for event in (RESOLVING, counts(1), counts(2), terminal(3)):
            await asyncio.sleep(0)
            broadcast.publish(event)
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(main()) == [RESOLVING, counts(1), counts(2), terminal(3)]


def test_a_subscriber_in_the_middle_gets_the_latest_counts_and_state_first() -> None:
    async def main() -> list[LoadingEvent]:
        broadcast = LoadingBroadcast()
        warming = WarmingUp(seq=3, elapsed_seconds=0.0)
        for event in (RESOLVING, counts(1), counts(2), warming):
            broadcast.publish(event)
        task = asyncio.create_task(collect(broadcast))
        await asyncio.sleep(0)
        broadcast.publish(terminal(4))
        return await asyncio.wait_for(task, 5)

    assert [event.seq for event in asyncio.run(main())] == [2, 3, 4]


def test_a_subscriber_between_two_layers_gets_the_latest_counts_once() -> None:
    async def main() -> list[LoadingEvent]:
        broadcast = LoadingBroadcast()
        for event in (RESOLVING, counts(1), counts(2)):
            broadcast.publish(event)
        collecting = asyncio.create_task(collect(broadcast))
        await asyncio.sleep(0)
        broadcast.publish(terminal(3))
        return await collecting

    assert asyncio.run(main()) == [counts(2), terminal(3)]


def test_a_late_subscriber_gets_the_last_counts_and_the_end() -> None:
    async def main() -> list[LoadingEvent]:
        broadcast = LoadingBroadcast()
        for event in (RESOLVING, counts(1), counts(2), ready(3)):
            broadcast.publish(event)
        return await asyncio.wait_for(collect(broadcast), 5)

    assert asyncio.run(main()) == [counts(2), ready(3)]


def test_a_slow_subscriber_misses_counts_and_never_the_end() -> None:
    async def main() -> list[LoadingEvent]:
        broadcast = LoadingBroadcast()
        broadcast.publish(RESOLVING)
        stream = aiter(broadcast.subscribe())
        seen = [await anext(stream)]
        for seq in range(1, 5000):
            broadcast.publish(counts(seq))
        broadcast.publish(terminal(5000))
        seen += [event async for event in stream]
        return seen

    seen = asyncio.run(main())
    assert len(seen) <= 257
    assert [event.seq for event in seen] == sorted({event.seq for event in seen})
    assert seen[-1] == terminal(5000)


def test_leaving_is_counted_and_harms_nobody() -> None:
    async def main() -> None:
        broadcast = LoadingBroadcast()
        broadcast.publish(RESOLVING)
        leaver, stayer = broadcast.subscribe(), broadcast.subscribe()
        await anext(leaver)
        await anext(stayer)
        assert broadcast.subscribers == 2
        await leaver.aclose()
        assert broadcast.subscribers == 1
        broadcast.publish(terminal(1))
        assert [event async for event in stayer] == [terminal(1)]
        assert broadcast.subscribers == 0

    asyncio.run(main())
