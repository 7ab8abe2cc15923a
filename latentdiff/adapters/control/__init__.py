"""What steers besides the prompt: loading it, the images that it follows, and what it is on a model.

model          a ControlNet, and a control: the two with an image and a strength
hints          an image as the hint that a network sees
preparation    hints made of photographs: edges, tiles
adapters       T2I-Adapters, which come through the same door
image_prompts  an IP-Adapter, and an image prompt: the two with images to resemble
seen           what an IP-Adapter makes of images
applied        all of it on one walk of a model
"""
