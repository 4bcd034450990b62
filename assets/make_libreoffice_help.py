"""Makes assets/libreoffice_help/ from a folder of train.tsv.gz, validation.tsv.gz and test.tsv.gz.

The files hold a pair a line, English<TAB>German; what is made has one line more, the header.
assets/libreoffice_help/NOTICE tells where the pairs come from.
Run: python assets/make_libreoffice_help.py FOLDER
"""

import gzip
import sys
from pathlib import Path

OUT = Path(__file__).parent / "libreoffice_help"

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    OUT.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        with gzip.open(Path(sys.argv[1]) / f"{split}.tsv.gz") as file:
            pairs = file.read()
        # No file name and no time inside, so that the same pairs give the same bytes.
        with open(OUT / f"{split}.tsv.gz", "wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as out:
            out.write(b"en\tde\n" + pairs)
        print(f"{split}: {len(pairs.splitlines()):,} pairs")
