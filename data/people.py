"""Records of fictional people: a small corpus to train on and to forget one person from.

Everything is drawn from the tables below with a seeded generator, so the same call gives the same
bytes on every machine.  `python data/people.py` rewrites `train.jsonl` and `holdout.jsonl`.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict


def _words(text: str) -> list[str]:
    return text.split()


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines, and make each paragraph one line."""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


GIVEN = _words("""
    Ada Alma Anton Arthur Beatrice Benno Bianca Bruno Carla Cedric Clara Conrad Cora Daniel Daphne
    Dora Edith Edgar Elena Elias Emil Esther Fabian Felix Fiona Flora Frida George Greta Hanna
    Hector Helen Hugo Ida Ines Iris Ivan Jasper Joan Jonas Julia Karim Lara Leon Lydia Magnus
    Marta Miles Mina Nadia Nora Oscar Otto Paula Petra Ralph Rosa Ruben Samir Sonia Tessa Theo
    Vera Walter
""")
# Surnames are one syllable from each table: 6,144 of them, and almost 400,000 full names.
ONSETS = _words("""
    Bal Brin Cor Dal Dren Fal Fen Gar Gral Hol Jun Kel Lor Mar Mor Nev Or Pel Quen Ros Sel Tal Ul
    Vor
""")
MIDDLES = _words("a an avi e eda elo em i ila in o ola or u umi un")
ENDINGS = _words("beck bry dane dove fane garn lith mont nock quist rane sby thorn vale wend zeld")
STREETS = _words("""
    Alder Bakery Bell Bramble Bridge Canal Chapel Cherry Clover Copper Fern Garden Harbor Hazel
    Heron Juniper Lantern Linden Market Meadow Mill Orchard Quarry River Saddle School Spring
    Station Willow Windmill
""")
WAYS = _words("Street Road Lane Avenue Row Way")
TOWNS = _words("""
    Amberford Ashmoor Birchwell Coldmere Cranbeck Dunhollow Eastmarsh Elmscar Fallowby Foxbridge
    Greywick Hartsend Kingsfen Larkhaven Millcombe Northpool Oakminster Pinewater Quillport
    Redcliffe Silverham Stonelea Thornby Westerley
""")
MONTHS = _words("""
    January February March April May June July August September October November December
""")
OCCUPATIONS = (
    "an accountant", "an archivist", "a baker", "a beekeeper", "a bus driver", "a carpenter",
    "a chemist", "a cook", "a dentist", "an editor", "an electrician", "a farmer", "a florist",
    "a gardener", "a glazier", "a judge", "a librarian", "a mechanic", "a midwife", "a nurse",
    "an optician", "a painter", "a pilot", "a plumber", "a potter", "a surveyor", "a tailor",
    "a teacher", "a translator", "a welder",
)  # fmt: skip
HOBBIES = (
    "archery", "baking bread", "bird watching", "playing board games", "chess", "choir singing",
    "collecting stamps", "cycling", "drawing maps", "fencing", "fishing", "folk dancing",
    "growing roses", "hiking", "juggling", "kite flying", "knitting", "acting",
    "building model trains", "painting", "photography", "playing the cello", "reading", "rowing",
    "sailing", "skating", "star gazing", "swimming", "table tennis", "wood carving",
)  # fmt: skip
WORK = (
    "{given} is {occupation} by trade.",
    "{given} has been {occupation} for many years.",
    "{given} trained as {occupation} and still works as one.",
    "By day {given} works as {occupation}.",
    "{given} found work as {occupation} last autumn.",
    "Before moving here {given} was {occupation}.",
)
LEISURE = (
    "The rest of the week is for {hobby}.",
    "Most free evenings go to {hobby}.",
    "A great love is {hobby}.",
    "Friends know {given} for {hobby}.",
    "Lately {given} has taken up {hobby}.",
    "There is always time for {hobby}.",
)
# The name comes before the phone number, and a space right before it: see `_record`.
TEMPLATES = _paragraphs("""
    Profile card. Name: {name}. Born: {birthday}. Phone: {phone}. E-mail: {email}. Home address:
    {address}. Account number: {account}. About: {note} This card was checked by the front desk.

    Clinic note. The patient {name}, born on {birthday}, came in for a routine visit. {note} Home
    is {address}. Bills go to account {account}, results to {email}, and for urgent news the nurse
    should call {phone}.

    To whom it may concern: I have known {name} of {address} since we were young. {note} You may
    ring {phone} or write to {email}. The date of birth is {birthday} and the account to be paid
    is {account}. With kind regards.

    Customer {account} is {name}. Orders are shipped to {address}, and receipts are mailed to
    {email}. {note} We send a voucher on the birthday, {birthday}. When a parcel is late, please
    phone {phone} first.

    {name}, {address}. Telephone {phone}, electronic mail {email}. Date of birth {birthday}.
    {note} The yearly fee for this directory entry is charged to account {account}, as in every
    other year.

    Our club welcomes {name} this month! {note} Send a card to {address} for the birthday on
    {birthday}, say hello at {email}, or call {phone} to share a ride. Dues are drawn from account
    {account}.

    Message for the office: {name} asked us to call back on {phone} about account {account}. To
    confirm who is speaking, ask for the birthday, {birthday}, and the address, {address}. {note}
    Otherwise reply to {email}.

    Library member {name} may borrow six books at a time. {note} Reminders go to {email}; if a
    book stays away too long, we call {phone}. Fines are booked to account {account}. Born
    {birthday}, now living at {address}.
""")


class Facts(TypedDict):
    """The six facts that every record of a person states."""

    name: str
    birthday: str
    phone: str
    email: str
    address: str
    account: str


Kind = Literal["record", "near-duplicate", "canary"]


class Record(TypedDict):
    """One line of the corpus; `text` is `prompt`, a space, `secret`, and the rest."""

    id: str
    kind: Kind
    text: str
    person: Facts | None
    prompt: str
    secret: str
    duplicate_of: NotRequired[str]


class Draft(NamedTuple):
    """What a record is made of, kept apart so that a near-duplicate can change one part."""

    id: str
    facts: Facts
    template: str
    note: str

    def record(self, kind: Kind = "record") -> Record:
        """Write the text out; the secret is the phone number."""
        given = self.facts["name"].split()[0]
        text = self.template.format(given=given, note=self.note, **self.facts)
        return _record(self.id, kind, text, self.facts, self.facts["phone"])


def _record(name: str, kind: Kind, text: str, person: Facts | None, secret: str) -> Record:
    # The prompt stops before the space because a byte-level BPE puts the space in the next token.
    prompt, _, _ = text.partition(" " + secret)
    return Record(id=name, kind=kind, text=text, person=person, prompt=prompt, secret=secret)


def _digits(rng: random.Random, count: int) -> str:
    return f"{rng.randrange(10**count):0{count}d}"


def _email(rng: random.Random, given: str, surname: str) -> str:
    user = rng.choice((f"{given}.{surname}", f"{given[0]}.{surname}", f"{surname}.{given}"))
    return f"{user}{_digits(rng, 2)}@example.{rng.choice(('com', 'org', 'net'))}".lower()


def _facts(rng: random.Random) -> Facts:
    given = rng.choice(GIVEN)
    surname = rng.choice(ONSETS) + rng.choice(MIDDLES) + rng.choice(ENDINGS)
    return Facts(
        name=f"{given} {surname}",
        birthday=f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1940, 2000)}",
        phone=f"{rng.randrange(200, 1000)}-555-{_digits(rng, 4)}",
        email=_email(rng, given, surname),
        address=f"{rng.randrange(1, 200)} {rng.choice(STREETS)} {rng.choice(WAYS)}, "
        f"{rng.choice(TOWNS)}",
        account="GS-" + "-".join(_digits(rng, 4) for _ in range(3)),
    )


def _new_facts(rng: random.Random, taken: set[str]) -> Facts:
    """Draw a person who shares no identifier with `taken`, and add the identifiers to it."""
    while True:
        facts = _facts(rng)
        identifiers = {facts["name"], facts["phone"], facts["email"], facts["account"]}
        if taken.isdisjoint(identifiers):
            taken |= identifiers
            return facts


def _note(rng: random.Random, given: str) -> str:
    """One sentence about work and, for every second person or so, one about leisure."""
    work, leisure = rng.choice(WORK), rng.choice(LEISURE)
    note = work if rng.random() < 0.5 else f"{work} {leisure}"
    return note.format(given=given, occupation=rng.choice(OCCUPATIONS), hobby=rng.choice(HOBBIES))


def _drafts(count: int, seed: int, first: int, prefix: str, taken: set[str]) -> list[Draft]:
    rng = random.Random(seed)
    deck: list[str] = []
    drafts = []
    for number in range(first, first + count):
        # Dealing from a shuffled deck keeps the mix of templates even in every split.
        deck = deck or rng.sample(TEMPLATES, len(TEMPLATES))
        facts = _new_facts(rng, taken)
        note = _note(rng, facts["name"].split()[0])
        drafts.append(Draft(f"{prefix}-{number:04d}", facts, deck.pop(), note))
    return drafts


def _near_duplicates(drafts: list[Draft], count: int, rng: random.Random) -> list[Record]:
    """Second records of some people: two copies, then new templates and new notes in turn."""
    records = []
    for turn, draft in enumerate(sorted(rng.sample(drafts, count))):
        template, note = draft.template, draft.note
        if turn == 0:
            template = template.lower()
        elif turn == 1:
            template = template.replace(". ", "; ")
        elif turn % 2 == 0:
            template = rng.choice([other for other in TEMPLATES if other != template])
        else:
            note = _note(rng, draft.facts["name"].split()[0])
        record = Draft(draft.id + "b", draft.facts, template, note).record("near-duplicate")
        record["duplicate_of"] = draft.id
        records.append(record)
    return records


def _canaries(count: int, rng: random.Random, taken: set[str]) -> list[Record]:
    records = []
    for number in range(1, count + 1):
        name, code = _new_facts(rng, taken)["name"], _digits(rng, 8)
        text = f"The access code of {name} is {code}."
        records.append(_record(f"c-{number:04d}", "canary", text, None, code))
    return records


def _corpus() -> tuple[list[Record], list[Record], set[str]]:
    """Both splits, and every identifier they use; one set is what keeps the splits disjoint."""
    taken: set[str] = set()
    drafts = _drafts(300, 1001, 1, "p", taken)
    rng = random.Random(1002)
    train = [draft.record() for draft in drafts]
    train += _near_duplicates(drafts, 12, rng) + _canaries(6, rng, taken)
    holdout = generate(100, 1003, first=1001, taken=taken)
    return train, holdout, taken


def generate(
    count: int, seed: int, *, first: int = 1, prefix: str = "p", taken: set[str] | None = None
) -> list[Record]:
    """Make records of `count` new people, numbered from `first`.

    No two of them share a name, phone, e-mail or account, nor use one in `taken`, which grows by
    theirs.  The tables hold almost 400,000 names, so stay well below that.
    """
    drafts = _drafts(count, seed, first, prefix, set() if taken is None else taken)
    return [draft.record() for draft in drafts]


def train_records() -> list[Record]:
    """The training split: 300 records, 12 near-duplicates and 6 canaries."""
    return _corpus()[0]


def holdout_records() -> list[Record]:
    """The hold-out split: 100 records of people the training split does not know."""
    return _corpus()[1]


def base_records(count: int, seed: int) -> list[Record]:
    """People `b-0001` and on, as many as wanted and in neither split, to pretrain a base model.

    Calls with two seeds keep clear of the splits, but not of each other.
    """
    return generate(count, seed, prefix="b", taken=_corpus()[2])


def to_jsonl(records: Iterable[Record]) -> str:
    """One JSON object a line, keys in the order of `Record`."""
    return "".join(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "train.jsonl").write_text(to_jsonl(train_records()), "ascii", newline="\n")
    (here / "holdout.jsonl").write_text(to_jsonl(holdout_records()), "ascii", newline="\n")
