"""A solution of exercise 10: what replaces the sheet's code of the same name."""


def schedule(forward, backward, in_flight):
    forwards = []
    backwards = []
    for k in range(len(forward)):
        may_start = [0]
        if k >= 1:
            may_start.append(forwards[k - 1][1])  # the group is busy until then
        if k >= in_flight:
            may_start.append(backwards[k - in_flight][1])  # the semaphore
        start = max(may_start)
        forwards.append((start, start + forward[k]))

        start = forwards[k][1]
        if k >= 1:
            start = max(start, backwards[k - 1][1])
        backwards.append((start, start + backward[k]))
    return forwards, backwards


def idle_shares(forwards, backwards):
    end = backwards[-1][1]
    busy = [sum(end - start for start, end in passes) for passes in (forwards, backwards)]
    return 1 - busy[0] / end, 1 - busy[1] / end
