"""Images from disk to the device.

backends     open TFDS data sets, image folders and the packaged digits
sources      labelled images that are read by position, decoded and resized
pipeline     the order of the images, batches, prefetching, each process's part of a batch
augment      random crops and flips, on the device
mixing       mixup and CutMix, on the device
preparation  downloads and converts TFDS data sets

Only downloading needs TensorFlow. Images stay uint8 until they are on the device.
"""
