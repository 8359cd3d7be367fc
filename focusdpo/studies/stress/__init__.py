"""`focusdpo stress`: does S put each reference's matches on its own subject, where subjects look alike and where they do not?

subjects, scenes: which subjects share a scene, as a dataset. work: scenes measured one by one, by S of every block and what
match_measures makes of it. summary: averages with intervals. plots: pictures.
"""
