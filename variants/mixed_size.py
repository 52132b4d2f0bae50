"""Images of several sizes, in turn from step to step.                                            [Table 13b]

    MixedSizeBatches --keys (epoch, index, size)--> MixedSizeDataset --> items of that size

All images of a step have one size, so they make one batch. The size is a function of the step alone: every
process takes the same, and a resumed run continues with the right one.
"""
import copy

from data import GlobalBatches, ImageDataset


class MixedSizeBatches(GlobalBatches):
    """GlobalBatches whose keys also name a size; sizes: px, one step each, in turn."""

    def __init__(self, *args, sizes, **options):
        super().__init__(*args, **options)
        self.sizes = sizes

    def key(self, position):
        step = position // self.batch_size
        return *super().key(position), self.sizes[step % len(self.sizes)]


class MixedSizeDataset(ImageDataset):
    """An ImageDataset (with its crop, its captions) whose keys may also name a size: (epoch, index, size).
    Keys without one give the data set's own size."""

    def __init__(self, dataset):
        vars(self).update(vars(dataset))

    def __getitem__(self, key):
        epoch, index, *size = key
        if not size:
            return super().__getitem__(key)
        other = copy.copy(self)
        other.size, = size
        return other[epoch, index]
