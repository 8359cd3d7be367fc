from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds for what has to come: a guard against hanging, also on a machine that is very busy
