"""Words of the tasks' templates. Each is one token of SmolLM2's tokenizer after a space; other tokenizers are checked pair by pair."""
# ruff: noqa: SIM905 (words without their quotes)

NAMES = (
    "James John Robert Michael William David Richard Thomas Charles Daniel Matthew Anthony Mark Paul Steven Andrew George Kevin Brian "
    "Edward Peter Henry Jack Adam Simon Martin Luke Frank Ben Sam Tom Eric Alan Philip Arthur Victor Leo Oscar Ryan Jason "
    "Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Margaret Ashley Emily Michelle Laura Amanda "
    "Rebecca Anna Emma Alice Rachel Julia Kate Amy Maria Helen Sophie Clara Jane Ruth Diana Martha Lucy Olivia Claire Caroline Ellen"
).split()
PLACES = (
    "store park school beach office library market hospital station garden museum restaurant church bank hotel farm river kitchen "
    "village airport theater gym lake mall"
).split()
OBJECTS = (
    "drink book ball gift letter ring key map picture bottle flower ticket phone card coin cup hat bag basket box cake watch pen toy"
).split()

SINGULAR = (
    "teacher doctor farmer student writer artist driver lawyer singer soldier player friend neighbor guard manager sailor nurse pilot "
    "painter author boy girl king queen brother sister dog cat horse bird truck boat tree house worker scientist engineer officer"
).split()
"""nouns whose plural is formed with -s"""

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki",
    "Hungary": "Budapest", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa", "England": "London",
    "Scotland": "Edinburgh", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Kenya": "Nairobi", "Belgium": "Brussels",
    "Ukraine": "Kiev", "Afghanistan": "Kabul", "Jamaica": "Kingston", "Australia": "Canberra", "Bulgaria": "Sofia",
    "Korea": "Seoul", "Wales": "Cardiff", "Israel": "Jerusalem",
}  # fmt: skip

EVENTS = (
    "war siege project festival drought conflict famine trial expedition construction dispute strike crisis rebellion revolution plague "
    "occupation debate"
).split()

MALE_FEMALE = (
    "king:queen uncle:aunt father:mother brother:sister son:daughter boy:girl man:woman husband:wife prince:princess actor:actress "
    "grandfather:grandmother dad:mom gentleman:lady groom:bride monk:nun"
).split()
ADJECTIVES = (
    "tired happy sad angry late sick early worried excited hungry bored proud nervous upset afraid busy lonely crying laughing smiling "
    "surprised scared confused quiet lost cold thirsty"
).split()
