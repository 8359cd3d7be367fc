"""Builds disrupted-instance pairs: photos, or scenes with their subjects, in; a folder with pairs.jsonl out.

photo_folder.py      a folder of photos per subject
encoder.py           what pictures look like to a network
cutting.py           cut-outs, and which of them can be trusted; cut_out_files.py keeps them, and what a person decides
composed_scenes.py   scenes of cut-outs; photo_pairs.py splits the photos first

scenes.py        the input format
config.py        the settings
candidate.py     a pair in the making, and the protocol of a stage
loading.py  segmentation.py  captioning.py  disruption.py  inpainting.py  gates.py  writing.py    the stages, in order
engines.py       runs them over all candidates: here, in processes, on a Ray cluster
builder.py       a build: manifest, resuming, report
blending.py      pasting without seams
composing.py     cut-outs put before backgrounds; photos.py has those of scikit-image
dreambench.py    DreamBench's lists
"""
