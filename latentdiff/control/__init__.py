"""ControlNets: loading them, the hints that they follow, and what they are on a model.

model        a ControlNet, and a control: the two with an image and a strength
hints        an image as the hint that a network sees
preparation  hints made of photographs: edges, tiles
applied      controls on one walk of a model
"""
