from PIL import Image

from latentdiff.training.sheets import sample_folder, write_samples


def test_samples_are_written_with_their_recipes(tmp_path):
    asked = []

    def make(prompt, *, seed):
        asked.append((tuple(prompt), tuple(seed)))
        images = [Image.new("RGB", (16, 16), (10 * index, 0, 0)) for index in range(len(prompt))]
        for image, text in zip(images, prompt, strict=True):
            image.info["parameters"] = text
        return images

    folder = sample_folder(tmp_path, 500, "ema")
    assert folder == tmp_path / "samples/step-00000500/ema"
    write_samples(make, ["a cat", "a dog"], folder, seed=5)
    assert asked == [(("a cat", "a dog"), (5, 6))]
    with Image.open(folder / "01.png") as written:
        assert written.text["parameters"] == "a dog" and written.getpixel((0, 0)) == (10, 0, 0)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 32
