"""A solution of exercise 12: what replaces the sheet's code of the same name."""

import hashlib
from concurrent.futures import ThreadPoolExecutor


def load_shards(get, entries, ahead):
    def fetch(entry):
        for _ in range(3):
            data = get(entry)
            if len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256:
                return data
        raise OSError(f"{entry.name} arrived damaged three times")

    with ThreadPoolExecutor(ahead + 1) as pool:
        futures = []
        for i in range(len(entries)):
            for entry in entries[len(futures) : i + ahead + 1]:
                futures.append(pool.submit(fetch, entry))
            data = futures[i].result()
            futures[i] = None  # so that a shard's memory is free when the caller has done with it
            yield data
