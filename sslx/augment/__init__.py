"""Random views of pictures, inside jit: float32 in [0, 1], ``[batch, height, width, channels]``, a key for each row.

crop (random resized crops, flips), colour (jitter, grey, blur, solarise), randaugment (Cubuk et al.) and mixing (mixup,
cutmix, random erasing) are the transformations; policy puts them in order, by a config, for one view a row or several.
pieces cuts a picture in nine.
"""
