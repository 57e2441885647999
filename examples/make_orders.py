"""Write the demo's data set: one sentence in, one order as JSON out.

    python examples/make_orders.py        # writes cli/orders/train.jsonl and heldout.jsonl

Every chat has one right answer, so a held-out reply is scored by equality: parse it and compare it with the expected object.
No held-out sentence is in the training file, and a third of its customers, items and cities are words that no
training chat has: what is learned is to copy and to normalise ("half a dozen benches" is 6 and "bench"), not the answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

SYSTEM = "Turn the order into JSON: customer, item, quantity, city, express."
SEED = 7
TRAIN_CHATS, HELDOUT_CHATS = 320, 100
UNSEEN_SHARE = 1 / 3

Chat = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Order:
    """The answer. Its field order is the key order of the JSON."""

    customer: str
    item: str  # singular
    quantity: int
    city: str
    express: bool


@dataclass(frozen=True)
class Words:
    customers: list[str]
    items: list[str]
    cities: list[str]


def words(*, customers: str, items: str, cities: str) -> Words:
    return Words(listed(customers), listed(items), listed(cities))


def listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


TRAINED = words(
    customers="""
        Anna,Ben,Carla,David,Emma,Frank,Grace,Henry,Irene,Jack,Karen,Leo,Maria,Nina,Oscar,Paul,Rosa,Simon,
        Tina,Victor,Wendy,Yusuf,Amir,Bella,Chen,Diego,Elena,Felix,Hannah,Ivan,Julia,Kevin,Laura,Marco,Nadia,
        Omar,Peter,Rachel,Sofia,Thomas,Aisha,Adam,Bruno,Camille,Charlotte,Claire,Cyrus,Edith,Edward,Eva,Fiona,
        Gloria,Gustav,Hugo,Ingrid,James,Jasmine,Joseph,Judith,Kofi,Linda,Louis,Lydia,Malik,Margaret,Matthew,
        Michael,Miriam,Monica,Nathan,Naomi,Nicholas,Oliver,Pamela,Philip,Priya,Quentin,Raj,Rebecca,Ruth,Samuel,
        Sergei,Stella,Susan,Theo,Ursula,Vera,Vincent,William,Yara,Zoe
    """,
    items="""
        lamp,chair,desk,mug,pillow,blanket,candle,mirror,towel,basket,clock,kettle,plate,bowl,spoon,rug,
        bottle,notebook,pencil,backpack,tent,helmet,jacket,ladder,hammer,bucket,battery,brush,bench,box,watch,
        toothbrush,bedspread,camera,carpet,coat,cup,drawer,drill,easel,engine,envelope,filter,flag,flute,frame,
        glove,guitar,hat,ink pen,jug,knot,laptop,magnet,mattress cover,napkin,needle,ornament,oven,paddle,piano,
        poster,printer,quilt,radio,ribbon,ring,rope,saddle,shirt,shovel,skirt,sponge,stamp,stool,suitcase,
        sweater,tablet,teapot,tie,tile,toaster,tray,vase,violin,wallet,wheel,whistle,window,zipper,red lamp,
        oak chair,blue mug,wool blanket,glass bowl,steel kettle,green towel,paper box,garden hose,lunch box,
        picture frame
    """,
    cities="""
        Paris,London,Berlin,Rome,Madrid,Vienna,Dublin,Oslo,Boston,Chicago,Dallas,Seattle,Denver,Miami,Tokyo,
        Sydney,Cairo,Delhi,Toronto,Lisbon,Athens,Prague,Warsaw,Zurich,New York,Hong Kong,San Diego,Cape Town,
        Accra,Ankara,Austin,Bangkok,Barcelona,Basel,Beirut,Belfast,Bogota,Bremen,Bristol,Bucharest,Budapest,
        Calgary,Cologne,Copenhagen,Damascus,Detroit,Dresden,Dubai,Edinburgh,Florence,Frankfurt,Geneva,Glasgow,
        Hamburg,Hanoi,Havana,Istanbul,Jakarta,Karachi,Krakow,Kyoto,Lagos,Leeds,Lyon,Manchester,Manila,Marseille,
        Melbourne,Memphis,Mumbai,Naples,Nashville,Orlando,Osaka,Ottawa,Oxford,Perth,Phoenix,Porto,Portland,Quito,
        Riga,Santiago,Seoul,Shanghai,Singapore,Sofia,Stockholm,Tampa,Tunis,Turin,Valencia,Vancouver,Venice,
        Zagreb,New Orleans,Salt Lake City,San Antonio,Buenos Aires,Tel Aviv,Las Vegas
    """,
)

UNSEEN = words(
    customers="""
        Alice,Brian,Clara,Daniel,Eric,Fatima,George,Helen,Isaac,Kate,Lucas,Martha,Noah,Olivia,Patrick,Robert,
        Sarah,Walter,Alan,Beatrice,Colin,Dora,Elias,Gabriel,Holly,Jonas,Leah,Mark,Nora,Roger
    """,
    items="""
        table,shelf lamp,pan,sofa,jar,scarf pin,keyboard,curtain,wooden chair,cotton towel,torch,phone case,fork,
        umbrella,shoe,bag,belt,book,pot,lock,broom,key,hook,doormat,sandal,cushion
    """,
    cities="""
        Amsterdam,Munich,Milan,Houston,Atlanta,Montreal,Nairobi,Lima,Los Angeles,San Francisco,Helsinki,Brussels,
        Leipzig,Malaga,Antwerp,Dakar,Bergen,Cleveland,Philadelphia,Brisbane,Rotterdam,Taipei,Baku,Lille
    """,
)

AMOUNTS = {
    **{word: n for n, word in enumerate(listed("two,three,four,five,six,seven,eight,nine,ten,eleven,twelve"), start=2)},
    **{str(n): n for n in range(2, 61)},
    "a dozen": 12,
    "half a dozen": 6,
    "a pair of": 2,
}

SENTENCES = (
    "{customer} wants {goods} sent to {city}{how}.",
    "{customer} in {city} ordered {goods}{how}.",
    "Please ship {goods} to {customer} in {city}{how}.",
    "Send {customer} {goods}, address in {city}{how}.",
    "{goods} for {customer}, {city}{how}.",
    "Order from {city}: {goods} for {customer}{how}.",
    "Hi, this is {customer}. I need {goods} in {city}{how}.",
    "Deliver to {city}{how}: {goods}, name {customer}.",
)
EXPRESS = (" by express", ", it is urgent", " as fast as you can", " right away")
NO_HURRY = ("", "", ", no rush", ", standard delivery", ", any time is fine")


def main() -> None:
    folder = Path(__file__).parent.parent / "cli" / "orders"
    folder.mkdir(exist_ok=True)
    seen: set[str] = set()
    write(folder / "train.jsonl", islice(chats(random.Random(SEED), seen, unseen_share=0.0), TRAIN_CHATS))
    write(folder / "heldout.jsonl", islice(chats(random.Random(SEED + 1), seen, unseen_share=UNSEEN_SHARE), HELDOUT_CHATS))


def chats(rng: random.Random, seen: set[str], *, unseen_share: float) -> Iterator[Chat]:
    """Chats without end, none with a sentence in `seen`, to which each adds its own."""
    while True:
        sentence, order = draw(rng, unseen_share)
        if sentence not in seen:
            seen.add(sentence)
            yield chat(sentence, order)


def draw(rng: random.Random, unseen_share: float) -> tuple[str, Order]:
    def source() -> Words:
        return UNSEEN if rng.random() < unseen_share else TRAINED

    amount = rng.choice(list(AMOUNTS)[: rng.choice((11, None))])  # as many number words as digits
    express = rng.random() < 0.5
    order = Order(
        rng.choice(source().customers), rng.choice(source().items), AMOUNTS[amount], rng.choice(source().cities), express
    )
    sentence = rng.choice(SENTENCES).format(
        customer=order.customer,
        goods=f"{amount} {plural(order.item)}",
        city=order.city,
        how=rng.choice(EXPRESS if express else NO_HURRY),
    )
    return sentence[0].upper() + sentence[1:], order


def plural(item: str) -> str:
    if item.endswith(("x", "ch", "sh")):
        return item + "es"
    return item[:-1] + "ies" if item.endswith("ry") else item + "s"


def chat(sentence: str, order: Order) -> Chat:
    answer = json.dumps(asdict(order), separators=(",", ":"))  # compact: a fifth fewer tokens to learn
    turns = (("system", SYSTEM), ("user", sentence), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, rows: Iterator[Chat]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
