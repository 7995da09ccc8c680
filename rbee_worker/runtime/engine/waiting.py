"""WaitingQueue: the sequences that wait for a place in the batch, and whose turn it is."""

from collections import Counter, deque
from collections.abc import Iterator

from rbee_worker.runtime.engine.sequence import Sequence


class WaitingQueue:
    """Each client is served first come, first served. Clients take turns.

    The next place goes to the client with the fewest running sequences. Among equals it goes to the one that was served
    longest ago. A client that comes back stands behind those that already wait, so nobody gains by coming back again
    and again. Preempted sequences come before all others.
    """

    def __init__(self) -> None:
        self._returning: list[Sequence] = []  # by arrival
        self._clients: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._returning) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returning
        for queue in self._clients.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        if sequence.client not in self._clients:
            self._clients[sequence.client] = deque()
            self._served[sequence.client] = self._turn - 1  # just before the one that was served last
        self._clients[sequence.client].append(sequence)

    def add_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence."""
        self._returning.append(sequence)
        self._returning.sort(key=lambda waiting: waiting.arrival)

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence; False when it does not wait."""
        queue: list[Sequence] | deque[Sequence] = self._clients.get(sequence.client, deque())
        if sequence in self._returning:
            queue = self._returning
        elif sequence not in queue:
            return False
        queue.remove(sequence)
        if not queue and queue is not self._returning:
            del self._clients[sequence.client]
            self._served.pop(sequence.client, None)
        return True

    def in_turn(self, running: Counter[str]) -> Iterator[Sequence]:
        """The waiting sequences, the next one first. The caller removes those that it admits.

        Args:
            running: how many sequences each client has in the batch. It is counted up for each one admitted.
        """
        yield from list(self._returning)
        left = {client: iter(list(queue)) for client, queue in self._clients.items()}
        while left:
            client = min(left, key=lambda name: (running[name], self._served.get(name, -1)))
            sequence = next(left[client], None)
            if sequence is None:
                del left[client]
                continue
            yield sequence
            if sequence not in self._clients.get(client, ()):
                running[client] += 1
                self._turn += 2
                if client in self._clients:
                    self._served[client] = self._turn
