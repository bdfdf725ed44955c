"""A solution of exercise 5: what replaces the sheet's code of the same name."""

from mpi4py import MPI

from common import softmax_cross_entropy


def local_sgd(comm, model, optimizer, batches, period):
    def average():
        comm.Allreduce(MPI.IN_PLACE, model.params)
        model.params /= comm.size

    steps = 0
    for x, labels in batches:
        _, dlogits = softmax_cross_entropy(model.forward(x), labels)
        model.backward(dlogits)
        optimizer.step(len(labels))
        steps += 1
        if steps % period == 0:
            average()
    if steps % period:
        average()
