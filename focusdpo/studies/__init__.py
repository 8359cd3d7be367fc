"""What is asked of trained models and methods: masks, ablations, the stress test, the microcosm.

These run models and training; `focusdpo.metrics` measures images whoever made them.
"""
