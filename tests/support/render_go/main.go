// Renders Go templates as Ollama does: {"Template", "Date", "Data"} as JSON lines in, {"Text", "Error"} out. With the
// argument "printable", instead, the ranges of characters that strconv.IsPrint takes, as JSON.
package main

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type request struct {
	Template string
	Date     string
	Data     struct {
		System, Prompt, Response string
		Messages                 []message
	}
}

type answer struct{ Text, Error string }

func render(asked request) (string, error) {
	functions := template.FuncMap{"currentDate": func(...string) string { return asked.Date }}
	made, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	err = made.Execute(&text, asked.Data)
	return text.String(), err
}

func printable() (ranges [][2]int) {
	for r := 0; r <= 0x10ffff; r++ {
		if !strconv.IsPrint(rune(r)) {
			continue
		}
		if n := len(ranges); n > 0 && ranges[n-1][1] == r {
			ranges[n-1][1] = r + 1
		} else {
			ranges = append(ranges, [2]int{r, r + 1})
		}
	}
	return
}

func main() {
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	if len(os.Args) > 1 && os.Args[1] == "printable" {
		out.Encode(printable())
		return
	}
	in := json.NewDecoder(os.Stdin)
	for in.More() {
		var asked request
		if err := in.Decode(&asked); err != nil {
			panic(err)
		}
		text, err := render(asked)
		if err != nil {
			out.Encode(answer{"", err.Error()})
		} else {
			out.Encode(answer{text, ""})
		}
	}
}
