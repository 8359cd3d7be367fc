# Settings of a small run, for tests of what damages and misleads it.
SMALL = {
    "data.resolution": 64,
    "data.reference_resolution": 32,
    "data.reference_resolution_multiple": None,
    "lora.rank": 2,
    "lora.alpha": 2,
    "lora.target_modules": ["to_q"],
    "focus.tau": 0.1,
    "max_steps": 4,
    "checkpoint_every": 2,
}
