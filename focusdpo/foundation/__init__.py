"""What every room stands on: files and output folders, processes, settings and text. It knows of no image and no model."""
