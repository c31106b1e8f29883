"""Small local copies of the public data sets, in the exact column layout and types of the Hub."""

from pathlib import Path

from PIL import Image


def picture(number: int) -> Image.Image:
    """An image that no other number gives."""
    return Image.new("RGB", (6, 5), (number, 255 - number, 40))


def features():
    """Columns and types by task; gqa has two configurations."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text, image = Value("string"), ImageFeature()
    return {
        "scienceqa": Features(
            {
                "image": image,
                "question": text,
                "choices": List(text),
                "answer": Value("int8"),
                "hint": text,
                "task": text,
                "grade": text,
                "subject": text,
                "topic": text,
                "category": text,
                "skill": text,
                "lecture": text,
                "solution": text,
            }
        ),
        "ai2d": Features({"question": text, "options": List(text), "answer": text, "image": image}),
        "mmmu": Features(
            {
                "id": text,
                "question": text,
                "options": text,
                "explanation": text,
                **{f"image_{n}": image for n in range(1, 8)},
                "img_type": text,
                "answer": text,
                "topic_difficulty": text,
                "question_type": text,
                "subfield": text,
            }
        ),
        "gqa": Features(
            {
                "id": text,
                "imageId": text,
                "question": text,
                "answer": text,
                "fullAnswer": text,
                "isBalanced": Value("bool"),
            }
        ),
        "gqa_images": Features({"id": text, "image": image}),
        "textvqa": Features(
            {
                "image_id": text,
                "question_id": Value("int32"),
                "question": text,
                "image": image,
                "image_width": Value("int32"),
                "ocr_tokens": List(text),
                "answers": List(text),
            }
        ),
        "pope": Features(
            {
                "id": text,
                "question_id": text,
                "question": text,
                "answer": text,
                "image_source": text,
                "image": image,
                "category": text,
            }
        ),
        "mme": Features(
            {"question_id": text, "image": image, "question": text, "answer": text, "category": text}
        ),
        "flickr30k": Features(
            {"image": image, "caption": List(text), "sentids": List(text), "img_id": text, "filename": text}
        ),
        "ocrbench": Features(
            {"dataset": text, "question": text, "question_type": text, "answer": List(text), "image": image}
        ),
    }


ROWS = {
    "scienceqa": [
        {
            "image": picture(1),
            "question": "Which of these states is farthest north?",
            "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
            "answer": 0,
            "hint": "",
            "task": "closed choice",
            "subject": "social science",
        },
        {
            "image": picture(2),
            "question": "Which is harder?",
            "choices": ["chalk", "quartz"],
            "answer": 1,
            "hint": "Hardness is how hard it is to scratch.",
            "task": "closed choice",
            "subject": "natural science",
        },
    ],
    "ai2d": [
        {
            "question": "What eats the frog?",
            "options": ["snake", "0", "grass"],
            "answer": "0",
            "image": picture(3),
        },
        {"question": "Which is D?", "options": ["x", "y", "z", "w"], "answer": "3", "image": picture(4)},
    ],
    "mmmu": [
        {
            "id": "validation_Art_1",
            "question": "Compare <image 2> with <image 1>.",
            "options": "['The <image 3>', \"Rubens's\", 'neither']",
            "image_1": picture(11),
            "image_2": picture(12),
            "image_3": picture(13),
            "image_4": picture(14),
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            "id": "validation_Math_2",
            "question": "How long is the side in <image 1>?",
            "options": "[]",
            "image_1": picture(15),
            "answer": "['1/4', '0.25']",
            "question_type": "open",
        },
    ],
    "gqa": [
        {
            "id": "201",
            "imageId": "n7",
            "question": "Is it overcast?",
            "answer": "no",
            "fullAnswer": "No, it is clear.",
            "isBalanced": True,
        },
        {
            "id": "202",
            "imageId": "n5",
            "question": "Who wears a hat?",
            "answer": "woman",
            "fullAnswer": "The woman.",
            "isBalanced": True,
        },
        {
            "id": "203",
            "imageId": "n7",
            "question": "What colour is the sky?",
            "answer": "blue",
            "fullAnswer": "The sky is blue.",
            "isBalanced": True,
        },
    ],
    "gqa_images": [
        {"id": "n5", "image": picture(21)},
        {"id": "n6", "image": picture(22)},
        {"id": "n7", "image": picture(23)},
    ],
    "textvqa": [
        {
            "image_id": "a",
            "question_id": 34602,
            "question": "what is the brand of this Nokia phone?",
            "image": picture(31),
            "image_width": 6,
            "ocr_tokens": ["NOKIA", "3310"],
            "answers": ["nokia"] * 8 + ["", "phone"],
        },
    ],
    "pope": [
        {
            "id": str(n),
            "question_id": str(n),
            "question": f"Is there a {thing} in the image?",
            "answer": answer,
            "image_source": "COCO_val2014_000000310196",
            "image": picture(41 + n),
            "category": category,
        }
        for n, (thing, answer, category) in enumerate(
            [("snowboard", "yes", "adversarial"), ("car", "no", "popular"), ("dog", "no", "random")]
        )
    ],
    "mme": [
        {
            "question_id": "code_reasoning/0020.png",
            "image": picture(44),
            "question": f"Is the output {thing}? Please answer yes or no.",
            "answer": answer,
            "category": "code_reasoning",
        }
        for thing, answer in [("0", "Yes"), ("1", "No")]
    ],
    "flickr30k": [
        {
            "image": picture(51),
            "caption": [f"Caption {n} of a dog." for n in range(5)],
            "sentids": [str(n) for n in range(5)],
            "img_id": "0",
            "filename": "1000092795.jpg",
        },
    ],
    "ocrbench": [
        {
            "dataset": "IIIT5K",
            "question": "what is written in the image? ",
            "question_type": "Regular Text Recognition",
            "answer": ["CENTRE"],
            "image": picture(61),
        },
        {
            "dataset": "HME100k",
            "question": "Please write out the expression of the formula in the image using LaTeX format.",
            "question_type": "Handwritten Mathematical Expression Recognition",
            "answer": ["\\frac { 1 } { 2 }"],
            "image": picture(62),
        },
    ],
}

# Where each lies in its repository: (rows, configuration, split, file name).
FILES = {
    "scienceqa": [("scienceqa", "ScienceQA-IMG", "test", "ScienceQA-IMG/test-00000-of-00001.parquet")],
    "ai2d": [("ai2d", "default", "test", "data/test-00000-of-00001.parquet")],
    "mmmu": [
        ("mmmu", "default", "dev", "data/dev-00000-of-00001.parquet"),
        ("mmmu", "default", "validation", "data/validation-00000-of-00001.parquet"),
    ],
    "gqa": [
        (
            "gqa",
            "testdev_balanced_instructions",
            "testdev",
            "testdev_balanced_instructions/testdev-00000-of-00001.parquet",
        ),
        (
            "gqa_images",
            "testdev_balanced_images",
            "testdev",
            "testdev_balanced_images/testdev-00000-of-00001.parquet",
        ),
    ],
    "textvqa": [("textvqa", "default", "validation", "data/validation-00000-of-00001.parquet")],
    "mme": [("mme", "default", "test", "data/test-00000-of-00001.parquet")],
    "pope": [("pope", "default", "test", "data/test-00000-of-00001.parquet")],
    "flickr30k": [("flickr30k", "default", "test", "data/test-00000-of-00001.parquet")],
    "ocrbench": [("ocrbench", "default", "test", "data/test-00000-of-00001.parquet")],
}


FILES["textvqa_ocr"] = FILES["textvqa"]


def write(task: str, folder: Path, rows: dict | None = None, *, card: bool = True, **options) -> Path:
    """Write one data set as its repository has it; ``options`` go to ``to_parquet``."""
    import datasets

    columns = features()
    configs: dict[str, list[str]] = {}
    for name, config, split, file in FILES[task]:
        data = (rows or ROWS)[name]
        filled = {column: [row.get(column) for row in data] for column in columns[name]}
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(filled, features=columns[name]).to_parquet(path, **options)
        pattern = file.split("00000")[0] + "*"
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {pattern}\n")
    if card:
        entries = [
            f"- config_name: {name}\n  data_files:\n{''.join(files)}" for name, files in configs.items()
        ]
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n")
    return folder
