"""HTML pages: of a training run, and of preference pairs; their templates are in templates/."""
