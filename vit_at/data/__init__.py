"""Images from disk to the device.

backends     open TFDS data sets and the packaged digits
folders      open image folders and arrays of images
transforms   how images are made square: squashed, or resized and cropped
ids          images chosen by a list of file names
sources      labelled images that are read by position, decoded and resized
own          what a recipe takes from the training images: size, normalisation, splits
pipeline     the order of the images, batches, prefetching, each process's part of a batch
augment      random crops, flips, erasing and colours, on the device
randaugment  RandAugment, on the device
mixing       mixup and CutMix, on the device
preparation  downloads and converts TFDS data sets

Only downloading needs TensorFlow. Images stay uint8 until they are on the device.
"""
