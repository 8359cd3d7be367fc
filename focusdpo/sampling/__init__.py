"""`focusdpo sample`: images of prompts with references, by a run's LoRA or any other."""
