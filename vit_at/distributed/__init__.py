"""Devices and processes.

devices      configures JAX and XLA: one device per CPU core, the compilation cache
sharding     the mesh over all devices, and how arrays lie on it
processes    several processes that act as one run
rendezvous   connections between the processes
"""
