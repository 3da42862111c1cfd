"""Devices and processes: how arrays lie on them, and how several machines act as one."""
