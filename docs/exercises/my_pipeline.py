"""Exercise 10: the schedule of a pipeline of forward and backward pass."""

import json
import statistics


def schedule(forward, backward, in_flight):
    """When each micro-batch is computed, if each pass begins as early as it may.

    forward, backward: seconds of each micro-batch. Returns two lists of (start, end), of the
    forward and of the backward passes. One group of cores does the forward passes, another one
    the backward passes, both in order.
    """
    # TODO


def idle_shares(forwards, backwards):
    """The shares of the time from 0 to the end of the last backward pass in which the forward
    group and the backward group are idle; of schedule()'s lists."""
    # TODO


def main():
    with open("results/split_cores_benchmark.json") as file:
        benchmark = json.load(file)
    samples = benchmark["turns"]
    count = benchmark["arguments"]["micro_batches"]

    def median(name, field):
        return statistics.median(sample[field] for sample in samples[name])

    forward = median("forward alone on its group", "forward")
    backward = median("backward alone on its group", "backward")
    update = median("backward alone on its group", "update")
    print(f"a batch alone: forward {forward:.3f} s, backward {backward:.3f} s")
    for name, in_flight in (("split", 1), ("pipelined", 2)):
        times = schedule([forward / count] * count, [backward / count] * count, in_flight)
        predicted = times[1][-1][1] + update
        print(
            f"{name:9}: {predicted:.3f} s predicted, {median(name, 'seconds'):.3f} s measured; "
            f"forward's cores idle {idle_shares(*times)[0]:.0%} predicted, "
            f"{median(name, 'forward_idle'):.0%} measured"
        )
    for count in (1, 2, 4, 8, 16):
        times = schedule([forward / count] * count, [backward / count] * count, 2)
        print(f"{count:2} micro-batches: idle {', '.join(f'{s:.0%}' for s in idle_shares(*times))}")


if __name__ == "__main__":
    main()
