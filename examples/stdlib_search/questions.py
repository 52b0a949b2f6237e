"""Questions about the standard library in plain English, and the names that answer them.

A question never shares a content word with the dotted names of its answers, so that it cannot be
answered by comparing words with names: the meaning has to be understood.
"""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """A question, and the full names of the documents that answer it equally well."""

    text: str
    answers: tuple[str, ...]


QUESTIONS: tuple[Question, ...] = (
    # Files and folders.
    Question("How do I wipe out a folder and everything inside it?", ("shutil.rmtree",)),
    Question("How can I duplicate a whole folder somewhere else?", ("shutil.copytree",)),
    Question("How do I put a whole folder into a single .zip bundle?", ("shutil.make_archive",)),
    Question("How much free room is left on my drive?", ("shutil.disk_usage",)),
    Question("Where is a program such as git installed on this machine?", ("shutil.which",)),
    Question(
        "How can I create a folder together with any missing parents above it?",
        ("os.makedirs", "pathlib.Path.mkdir"),
    ),
    Question(
        "How do I visit every folder below a starting point and see the files in each?",
        ("os.walk",),
    ),
    Question(
        "How do I rename a file and overwrite the target if there is one?",
        ("os.replace", "pathlib.Path.replace"),
    ),
    Question("How do I make a file read-only?", ("os.chmod", "pathlib.Path.chmod")),
    Question("In which folder am I at the moment?", ("os.getcwd", "pathlib.Path.cwd")),
    Question("How many bytes long is a file?", ("os.path.getsize",)),
    Question("When was a file last written to?", ("os.path.getmtime",)),
    Question("How do I cut a file name into its root and its .txt ending?", ("os.path.splitext",)),
    Question(
        "What is the deepest folder that contains all of these files?", ("os.path.commonpath",)
    ),
    Question("How do I write the way from one folder to another with ../..?", ("os.path.relpath",)),
    Question(
        "How do I follow all symbolic links to find the true location of a file?",
        ("os.path.realpath", "pathlib.Path.resolve"),
    ),
    Question(
        "How do I turn a leading ~ into my home folder?",
        ("os.path.expanduser", "pathlib.Path.expanduser"),
    ),
    Question("How do I load everything in a file as one string?", ("pathlib.Path.read_text",)),
    Question(
        "How do I swap the .jpeg ending of a file name for .png?",
        ("pathlib.PurePath.with_suffix",),
    ),
    Question(
        "How do I create an empty file, or refresh its date if it is already there?",
        ("pathlib.Path.touch",),
    ),
    Question(
        "How do I list the files in a folder whose names fit a wildcard such as *.txt?",
        ("glob.glob", "glob.iglob", "pathlib.Path.glob"),
    ),
    Question(
        "How do I test whether 'report.txt' fits the wildcard '*.txt'?",
        ("fnmatch.fnmatch", "fnmatch.fnmatchcase", "pathlib.PurePath.match"),
    ),
    Question(
        "How can I check that two documents on disk hold exactly the same bytes?",
        ("filecmp.cmp",),
    ),
    Question(
        "How can I have a scratch folder that vanishes by itself when I am done with it?",
        ("tempfile.TemporaryDirectory",),
    ),
    Question("How do I display permission bits like -rwxr-xr-x?", ("stat.filemode",)),
    Question("How do I fetch just the 42nd row of a module's source code?", ("linecache.getline",)),
    Question(
        "How can I loop over the rows of every document given as an argument of my script?",
        ("fileinput", "fileinput.FileInput", "fileinput.input"),
    ),
    # Text.
    Question(
        "How do I take away the margin that every row of a triple-quoted string begins with?",
        ("textwrap.dedent",),
    ),
    Question(
        "How do I put '> ' in front of every row of a message I am quoting?",
        ("textwrap.indent",),
    ),
    Question(
        "How do I cut a long sentence down to 50 characters, with [...] at the end?",
        ("textwrap.shorten",),
    ),
    Question(
        "How do I break a long paragraph so that no row is wider than 70 columns?",
        (
            "textwrap.fill",
            "textwrap.wrap",
            "textwrap.TextWrapper.fill",
            "textwrap.TextWrapper.wrap",
        ),
    ),
    Question(
        "How can I make two words compare equal whether or not they are in capitals, even with ß?",
        ("str.casefold",),
    ),
    Question(
        "How do I drop 'www.' from the front of a host, if it is there?", ("str.removeprefix",)
    ),
    Question("How can I pad '7' to '007'?", ("str.zfill",)),
    Question("How do I put a heading in the middle of 80 columns?", ("str.center",)),
    Question("How do I cut a sentence in two at the first colon?", ("str.partition",)),
    Question("How do I glue a list of words together with commas between them?", ("str.join",)),
    Question(
        "How can I swap single characters for others by means of a lookup table?",
        ("str.translate",),
    ),
    Question("Could 'total_2' serve as the name of a variable?", ("str.isidentifier",)),
    Question("What is the code point of a letter?", ("ord",)),
    Question(
        "How do I make accented letters compare equal, whether composed or decomposed?",
        ("unicodedata.normalize",),
    ),
    Question(
        "How can I suggest the right spelling when somebody mistypes a word?",
        ("difflib.get_close_matches",),
    ),
    Question(
        "How alike are two strings, on a scale from 0 to 1?",
        ("difflib.SequenceMatcher", "difflib.SequenceMatcher.ratio"),
    ),
    Question(
        "How do I list the edits between two revisions of a document, like a patch?",
        ("difflib.context_diff", "difflib.unified_diff"),
    ),
    Question(
        "How do I cut a string at several different delimiters in one go?",
        ("re.split", "re.Pattern.split"),
    ),
    Question(
        "How do I search for user input literally when it may hold characters such as ( or +?",
        ("re.escape",),
    ),
    Question("How do I fill in placeholders such as $name in a letter?", ("string.Template",)),
    Question(
        "How do I break a typed command into its arguments while respecting quotes?",
        ("shlex.split",),
    ),
    Question("How do I make a file name with blanks safe to paste into bash?", ("shlex.quote",)),
    Question(
        "How can I display a deeply nested structure neatly, one element to a row?",
        ("pprint.pformat", "pprint.pp", "pprint.pprint"),
    ),
    Question(
        "How do I write an amount of money the way people do in the user's country?",
        ("locale.currency",),
    ),
    # Dates and times.
    Question(
        "How do I read a moment written as 31/12/2024 14:05, given its layout?",
        ("datetime.datetime.strptime", "time.strptime"),
    ),
    Question("Does a given year have a 29th of February?", ("calendar.isleap",)),
    Question(
        "How many days does February have, and on which weekday does it begin?",
        ("calendar.monthrange",),
    ),
    Question("How do I pause the whole program for two seconds?", ("time.sleep",)),
    Question(
        "What is the most precise clock for measuring very short durations?",
        ("time.perf_counter", "time.perf_counter_ns"),
    ),
    Question(
        "How do I benchmark a small snippet of code?",
        ("timeit", "timeit.Timer", "timeit.Timer.timeit", "timeit.timeit"),
    ),
    Question(
        "How do I list every region, such as Europe/Paris, whose local clock is known?",
        ("zoneinfo.available_timezones",),
    ),
    # Numbers, statistics and chance.
    Question(
        "What is the largest whole number that goes evenly into both 12 and 18?", ("math.gcd",)
    ),
    Question(
        "In how many ways can I choose 3 items out of 10 when their order is irrelevant?",
        ("math.comb",),
    ),
    Question("How many ordered arrangements of 3 out of 10 items are there?", ("math.perm",)),
    Question("How do I multiply all the numbers of a list together?", ("math.prod",)),
    Question("How do I add up many floats without losing precision?", ("math.fsum",)),
    Question("How long is the third side of a right triangle, given both legs?", ("math.hypot",)),
    Question("Are two floats nearly equal, rounding errors aside?", ("math.isclose",)),
    Question("How do I convert radians so that a full circle is 360?", ("math.degrees",)),
    Question("How do I compute both the quotient and the remainder?", ("divmod",)),
    Question(
        "How do I approximate pi by a simple ratio such as 22/7?",
        ("fractions.Fraction.limit_denominator",),
    ),
    Question(
        "How do I calculate with more digits inside one with block only?",
        ("decimal.localcontext",),
    ),
    Question("How do I find the middle value of my data?", ("statistics.median",)),
    Question(
        "How spread out are my measurements, in the same unit as themselves?",
        ("statistics.pstdev", "statistics.stdev"),
    ),
    Question(
        "Which cut points divide my data into four groups that are equally likely?",
        ("statistics.quantiles",),
    ),
    Question(
        "How strongly do two variables rise and fall together, from -1 to 1?",
        ("statistics.correlation",),
    ),
    Question(
        "How do I find the slope and the intercept that best fit my points?",
        ("statistics.linear_regression",),
    ),
    Question("How do I mix up a deck of cards in place?", ("random.shuffle",)),
    Question("How do I draw six lottery numbers, none of them twice?", ("random.sample",)),
    Question(
        "How do I draw with replacement when some items are likelier than others?",
        ("random.choices",),
    ),
    Question(
        "How do I draw numbers from a bell curve with a given average and spread?",
        ("random.gauss", "random.normalvariate", "statistics.NormalDist.samples"),
    ),
    Question("How can I make my dice come out the same on every run?", ("random.seed",)),
    # Collections and iteration.
    Question(
        "Which container lets me add and drop items quickly at both ends?",
        ("collections.deque",),
    ),
    Question(
        "Which mapping makes up a value by itself when a key is missing?",
        ("collections.defaultdict",),
    ),
    Question(
        "How do I look a key up in several dictionaries as if they were one?",
        ("collections.ChainMap",),
    ),
    Question(
        "What are the ten words with the highest frequency?", ("collections.Counter.most_common",)
    ),
    Question(
        "How do I put a key that is already there behind the others of its mapping?",
        ("collections.OrderedDict.move_to_end",),
    ),
    Question(
        "How do I make a lightweight record whose fields are reached by label and by position?",
        ("collections.namedtuple", "typing.NamedTuple"),
    ),
    Question(
        "Which container stores millions of numbers of one kind compactly?",
        ("array", "array.array"),
    ),
    Question(
        "How do I add an item to a sequence that is in order, so that it stays in order?",
        ("bisect.insort_left", "bisect.insort_right"),
    ),
    Question("How do I find the three biggest items?", ("heapq.nlargest",)),
    Question(
        "How do I combine streams that are each in order into one, without loading them all?",
        ("heapq.merge",),
    ),
    Question("How do I put things in ascending order?", ("list.sort", "sorted")),
    Question("How do I go through a sequence from back to front?", ("reversed",)),
    Question("How do I loop over a list and know the position I am at?", ("enumerate",)),
    Question("How do I loop over two lists in parallel?", ("zip",)),
    Question(
        "How do I loop over two lists side by side and pad the shorter of them?",
        ("itertools.zip_longest",),
    ),
    Question("How do I loop over each element and its next neighbour?", ("itertools.pairwise",)),
    Question("Which teams of two can be formed from ten players?", ("itertools.combinations",)),
    Question("How do I replace nested for loops by one loop?", ("itertools.product",)),
    Question(
        "How do I flatten a list of lists by one level?",
        ("itertools.chain", "itertools.chain.from_iterable"),
    ),
    Question("How do I pick just the first ten results of a generator?", ("itertools.islice",)),
    Question("How do I compute running totals?", ("itertools.accumulate",)),
    Question("How do I go round and round the same elements forever?", ("itertools.cycle",)),
    Question("How do I bundle consecutive elements that share a key?", ("itertools.groupby",)),
    Question(
        "How do I keep elements only up to the first one that fails a condition?",
        ("itertools.takewhile",),
    ),
    Question(
        "How do I split a generator in two that can be consumed independently?",
        ("itertools.tee",),
    ),
    # Functions, classes and types.
    Question(
        "How do I remember the results of an expensive call, so as not to compute them again?",
        ("functools.cache", "functools.lru_cache"),
    ),
    Question("How do I freeze some of the arguments of a callable?", ("functools.partial",)),
    Question("How do I fold a list into a single value?", ("functools.reduce",)),
    Question(
        "How do I get from __eq__ and __lt__ to all the other comparisons?",
        ("functools.total_ordering",),
    ),
    Question(
        "How do I choose an implementation by the type of the first argument?",
        ("functools.singledispatch", "functools.singledispatchmethod"),
    ),
    Question(
        "How do I keep the name and the docstring of what I decorate?",
        ("functools.update_wrapper", "functools.wraps"),
    ),
    Question(
        "How do I build a sort key that fetches the second column of each row?",
        ("operator.itemgetter",),
    ),
    Question("How do I read a field of an object whose name is in a variable?", ("getattr",)),
    Question("How do I clone a nested list so that nothing is shared?", ("copy.deepcopy",)),
    Question(
        "How do I have __init__ and __repr__ written for me from annotated fields?",
        ("dataclasses.dataclass",),
    ),
    Question(
        "How do I derive a copy of a frozen record with one field altered?",
        ("dataclasses.replace",),
    ),
    Question("How do I forbid two symbolic constants from being equal?", ("enum.unique",)),
    Question("How do I oblige subclasses to implement something?", ("abc.abstractmethod",)),
    Question(
        "What can serve as a bag of attributes that I add as I please?",
        ("types.SimpleNamespace",),
    ),
    Question("How do I declare several call signatures of one function?", ("typing.overload",)),
    Question(
        "How do I read the annotations of a function with forward references resolved?",
        ("typing.get_type_hints",),
    ),
    Question(
        "Which mapping forgets an entry once nobody else holds on to the object in it?",
        ("weakref.WeakValueDictionary",),
    ),
    Question(
        "How do I turn a generator into something for a with statement?",
        ("contextlib.contextmanager",),
    ),
    Question(
        "How do I enter a number of with blocks that is only known at runtime?",
        ("contextlib.ExitStack",),
    ),
    Question("How do I ignore one kind of exception in a with block?", ("contextlib.suppress",)),
    Question(
        "How do I send what print writes to a buffer of mine instead of the screen?",
        ("contextlib.redirect_stdout",),
    ),
    # Concurrency and other programs.
    Question(
        "How do I wait for several coroutines and collect their results?",
        ("asyncio.gather",),
    ),
    Question(
        "How do I call a slow blocking function without freezing the event loop?",
        ("asyncio.to_thread",),
    ),
    Question(
        "How do I handle the results of background jobs in the order that they finish?",
        ("asyncio.as_completed", "concurrent.futures.as_completed"),
    ),
    Question(
        "How do I spread the work on a list over several workers and collect the results?",
        (
            "concurrent.futures.Executor.map",
            "concurrent.futures.ProcessPoolExecutor.map",
            "multiprocessing.pool.Pool.map",
        ),
    ),
    Question(
        "How do I give one call to a worker and obtain a handle to its later result?",
        ("concurrent.futures.Executor.submit", "multiprocessing.pool.Pool.apply_async"),
    ),
    Question(
        "How many cores does this machine have?",
        ("multiprocessing.cpu_count", "os.cpu_count"),
    ),
    Question(
        "How can two programs look at the same block of RAM?",
        ("multiprocessing.shared_memory.SharedMemory",),
    ),
    Question("How can each worker have a private copy of a global variable?", ("threading.local",)),
    Question(
        "How do I have a function called in the background half a minute from now?",
        ("threading.Timer",),
    ),
    Question(
        "Which waiting line hands out the newest entry before the older ones?",
        ("asyncio.LifoQueue", "queue.LifoQueue"),
    ),
    Question(
        "How do I launch another program and capture what it prints?",
        (
            "subprocess.check_output",
            "subprocess.getoutput",
            "subprocess.getstatusoutput",
            "subprocess.run",
        ),
    ),
    Question(
        "In what sequence can I carry out jobs that depend on each other?",
        ("graphlib.TopologicalSorter", "graphlib.TopologicalSorter.static_order"),
    ),
    # Networks.
    Question(
        "How do I download a web page?",
        ("urllib.request.urlopen", "urllib.request.urlretrieve"),
    ),
    Question(
        "How do I put blanks and accents into a link as %20 and the like?", ("urllib.parse.quote",)
    ),
    Question(
        "How do I break a web address into host, port and so on?",
        ("urllib.parse.urlparse", "urllib.parse.urlsplit"),
    ),
    Question(
        "How do I resolve a relative link against the page it is on?", ("urllib.parse.urljoin",)
    ),
    Question(
        "How do I turn 'a=1&b=2' into names and values?",
        ("urllib.parse.parse_qs", "urllib.parse.parse_qsl"),
    ),
    Question(
        "Is my crawler allowed to visit a page?",
        ("urllib.robotparser.RobotFileParser.can_fetch",),
    ),
    Question(
        "How do I offer the files of a folder to people's browsers?",
        ("http.server.SimpleHTTPRequestHandler",),
    ),
    Question(
        "How do I show a page to the user in Firefox or whatever they prefer?",
        ("webbrowser.open", "webbrowser.open_new", "webbrowser.open_new_tab"),
    ),
    Question("What is my computer called?", ("platform.node", "socket.gethostname")),
    Question(
        "Which IP does a domain resolve to?",
        ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex"),
    ),
    Question(
        "Which machines can there be in the block 192.168.0.0/24?",
        ("ipaddress.IPv4Network.hosts",),
    ),
    Question(
        "How do I pull Ann and ann@example.org out of 'Ann <ann@example.org>'?",
        ("email.utils.parseaddr",),
    ),
    Question(
        "How do I switch a session with an outgoing mail relay to encryption?",
        ("smtplib.SMTP.starttls",),
    ),
    # Formats, storage, compression and hashes.
    Question(
        "How do I turn dictionaries and lists into text that a browser script can read?",
        ("json.JSONEncoder.encode", "json.dump", "json.dumps"),
    ),
    Question("How do I go through the rows of a spreadsheet export?", ("csv", "csv.reader")),
    Question(
        "How can I find out which delimiter a spreadsheet export uses?",
        ("csv.Sniffer", "csv.Sniffer.sniff"),
    ),
    Question(
        "How do I work through a huge document of nested tags piece by piece?",
        ("xml.etree.ElementTree.iterparse",),
    ),
    Question(
        "How do I insert whitespace so that a document of nested tags is laid out nicely?",
        ("xml.etree.ElementTree.indent",),
    ),
    Question("How do I react to each tag of a web page?", ("html.parser.HTMLParser",)),
    Question("How do I show < and & from users safely on a web page?", ("html.escape",)),
    Question("How do I turn &eacute; and &amp; back into plain characters?", ("html.unescape",)),
    Question(
        "How do I load settings from an .ini file?",
        ("configparser", "configparser.ConfigParser", "configparser.RawConfigParser.read"),
    ),
    Question(
        "How do I read the preferences of a Mac app?",
        ("plistlib", "plistlib.load", "plistlib.loads"),
    ),
    Question(
        "How do I keep a dictionary of arbitrary objects on disk between runs?",
        ("shelve", "shelve.Shelf", "shelve.open"),
    ),
    Question(
        "How do I turn nearly any Python object into bytes, to be restored later?",
        ("pickle.dump", "pickle.dumps"),
    ),
    Question(
        "How do I lay out numbers as the raw bytes that a C program expects?",
        ("struct.Struct.pack", "struct.pack"),
    ),
    Question("How do I open a relational database kept in one file?", ("sqlite3.connect",)),
    Question(
        "How can my Python code be called from within a database query?",
        ("sqlite3.Connection.create_function",),
    ),
    Question(
        "How do I write a whole database out as a script of statements?",
        ("sqlite3.Connection.iterdump",),
    ),
    Question(
        "How do I undo all changes of a pending transaction?",
        ("sqlite3.Connection.rollback",),
    ),
    Question(
        "How do I shrink some bytes to save space?",
        ("bz2.compress", "gzip.compress", "lzma.compress", "zlib.compress"),
    ),
    Question(
        "How do I compute a quick checksum against accidental damage?",
        ("binascii.crc32", "zlib.adler32", "zlib.crc32"),
    ),
    Question(
        "How do I turn an image into nothing but letters, digits, plus and slash?",
        (
            "base64.b64encode",
            "base64.encodebytes",
            "base64.standard_b64encode",
            "binascii.b2a_base64",
        ),
    ),
    Question(
        "How do I stretch a user's passphrase with salt, to make guessing it slow?",
        ("hashlib.pbkdf2_hmac", "hashlib.scrypt"),
    ),
    Question(
        "How do I sign a payload with a shared secret?",
        ("hmac.HMAC", "hmac.digest", "hmac.new"),
    ),
    Question(
        "How do I check two passwords for equality without leaking anything by timing?",
        ("secrets.compare_digest",),
    ),
    Question(
        "How do I make up an unguessable string for a password reset link?",
        ("secrets.token_hex", "secrets.token_urlsafe"),
    ),
    Question(
        "What kind of content is in a file called photo.jpg?",
        ("mimetypes.MimeTypes.guess_type", "mimetypes.guess_type"),
    ),
    # Programs, tests and the interpreter.
    Question(
        "How do I declare that my script takes a --verbose flag?",
        ("argparse.ArgumentParser.add_argument",),
    ),
    Question("How do I ask for a secret without echoing what is typed?", ("getpass.getpass",)),
    Question("How do I ask the user to type something on the terminal?", ("input",)),
    Question("How do I read a shell variable such as HOME, with a fallback?", ("os.getenv",)),
    Question(
        "How do I keep the record of my server's events from growing without bound?",
        ("logging.handlers.RotatingFileHandler",),
    ),
    Question(
        "How do I record an error together with its traceback?",
        ("logging.Logger.exception", "logging.exception"),
    ),
    Question(
        "How do I silence deprecation messages?",
        ("warnings.filterwarnings", "warnings.simplefilter"),
    ),
    Question(
        "How do I turn the current error report into a string instead of printing it?",
        ("traceback.format_exc", "traceback.format_exception"),
    ),
    Question(
        "How do I put a fake in place of a real object inside a with block?",
        ("unittest.mock.patch",),
    ),
    Question(
        "How do I check that a call fails with a particular exception?",
        ("unittest.TestCase.assertRaises", "unittest.TestCase.assertRaisesRegex"),
    ),
    Question(
        "How do I check that the >>> examples I wrote still give the results they show?",
        ("doctest", "doctest.testfile", "doctest.testmod"),
    ),
    Question("How do I halt my program at this very spot and step through it?", ("breakpoint",)),
    Question(
        "Which functions make my program slow?",
        ("cProfile", "cProfile.Profile", "cProfile.run", "profile"),
    ),
    Question(
        "Which parameters does a callable take?",
        ("inspect.getfullargspec", "inspect.signature"),
    ),
    Question(
        "How do I see the code of a function as it was written?",
        ("inspect.getsource", "inspect.getsourcelines"),
    ),
    Question(
        "How do I see the virtual machine operations behind a function?",
        ("dis.Bytecode", "dis.dis", "dis.disassemble", "dis.get_instructions"),
    ),
    Question(
        "How do I safely turn the text '[1, 2]' into a list, without running arbitrary code?",
        ("ast.literal_eval",),
    ),
    Question(
        "How do I load a plugin whose name is only known at runtime?",
        ("importlib.import_module",),
    ),
    Question(
        "How do I pick up the edits to a module without restarting the interpreter?",
        ("importlib.reload",),
    ),
    Question("Which release of a package do I have?", ("importlib.metadata.version",)),
    Question(
        "How do I reach a picture that is shipped along with my own code?",
        ("importlib.resources.files", "pkgutil.get_data"),
    ),
    Question("Am I on Windows, Linux or a Mac?", ("platform.system",)),
    Question("How much memory does an object occupy?", ("sys.getsizeof",)),
    Question(
        "How do I allow deeper nesting of function calls before Python gives up?",
        ("sys.setrecursionlimit",),
    ),
    Question("How do I free unreachable objects right now?", ("gc.collect",)),
    Question(
        "How do I have some cleanup code called when the interpreter shuts down?",
        ("atexit.register",),
    ),
    Question("How do I call into a compiled shared object such as libm.so?", ("ctypes.CDLL",)),
)
