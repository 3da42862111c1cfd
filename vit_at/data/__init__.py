"""Images from disk to the device: backends and sources read, pipeline orders, augment alters.

Nothing here imports TensorFlow. Images stay uint8 until they are on the device.
"""
