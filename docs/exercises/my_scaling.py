"""Exercise 7: Amdahl's and Gustafson's laws against run logs."""

import csv


def amdahl(share, ranks):
    """The speed-up for a problem of fixed size."""
    # TODO


def gustafson(share, ranks):
    """The speed-up for a problem that grows with the ranks."""
    # TODO


def karp_flatt(speedup, ranks):
    """The serial share that explains a measured speed-up: Karp and Flatt, 1990."""
    # TODO


def serial_share(path):
    """The share of the last epoch's training time that is not loading, forward or backward."""
    # TODO


def speedup(serial_path, parallel_path):
    """The images/s of the last epoch's training of one log, divided by those of the other."""
    # TODO


def main():
    runs = (
        ("strong: 64 images a step", "results/serial_64.csv", amdahl),
        ("weak: 32 images a rank and step", "results/serial_32.csv", gustafson),
    )
    for name, serial, law in runs:
        share = serial_share(serial)
        measured = speedup(serial, "results/two_ranks.csv")
        print(
            f"{name}: serial share {share:.1%}, speed-up predicted {law(share, 2):.2f}, "
            f"measured {measured:.2f}; Karp and Flatt's share {karp_flatt(measured, 2):.1%}"
        )


if __name__ == "__main__":
    main()
