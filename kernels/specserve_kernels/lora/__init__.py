"""Adapters of a mixed batch: the CPU's dense form and the GPU's grouped one."""
