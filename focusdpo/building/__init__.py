"""Builds disrupted-instance pairs: scenes with their subjects in, a folder with pairs.jsonl out.

scenes.py        the input format
config.py        the settings
candidate.py     a pair in the making, and the protocol of a stage
loading.py  segmentation.py  captioning.py  disruption.py  inpainting.py  gates.py  writing.py    the stages, in order
engines.py       runs them over all candidates: here, in processes, on a Ray cluster
builder.py       a build: manifest, resuming, report
blending.py      pasting without seams
composing.py     cut-outs put into scenes as they are; photos.py has those of scikit-image, cutting.py those of DreamBench
dreambench.py    DreamBench's lists; dreambench_scenes.py makes scenes of its photos
"""
